"""An advantage actor-critic in torch alone that learns to hold a pendulum up: python tests/scripts/actor_critic.py"""

import torch
from torch import nn

PENDULUMS, HORIZON, GAMMA, DT = 32, 16, 0.9, 0.05


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.actor, self.critic = (nn.Sequential(self.trunk, nn.Linear(64, 1)) for _ in range(2))
        self.log_std = nn.Parameter(torch.zeros(1))

    def forward(self, state):
        angle, speed = state.unbind(-1)
        seen = torch.stack([angle.cos(), angle.sin(), speed], -1)
        policy = torch.distributions.Normal(self.actor(seen), self.log_std.exp())
        return policy, self.critic(seen).squeeze(-1)


def step(state, torque):
    angle, speed = state.unbind(-1)
    speed = (speed + (5 * angle.sin() + 5 * torque.tanh()) * DT).clamp(-4, 4)
    return torch.stack([angle + speed * DT, speed], -1), -angle.square() - 0.1 * speed.square()


def main(convert=lambda model: model, optimizer=torch.optim.AdamW, steps=200):
    torch.manual_seed(0)
    model, value_loss = ActorCritic(), nn.MSELoss()
    convert(model)
    convert(value_loss)
    opt = optimizer(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        state = torch.rand(PENDULUMS, 2) - 0.5  # (angle from upright, speed)
        rewards, values, log_probs = [], [], []
        for _ in range(HORIZON):
            policy, value = model(state)
            torque = policy.sample()
            state, reward = step(state, torque.squeeze(-1))
            rewards.append(reward)
            values.append(value)
            log_probs.append(policy.log_prob(torque).squeeze(-1))
        returns = [model(state)[1].detach()]
        for reward in reversed(rewards):
            returns.insert(0, reward + GAMMA * returns[0])
        returns, values = torch.stack(returns[:-1]), torch.stack(values)
        advantage = nn.functional.layer_norm((returns - values).detach(), values.shape)
        loss = value_loss(values, returns) - (torch.stack(log_probs) * advantage).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(*main()[::20])
