"""A character-level GPT in torch alone, on text that comes with Python: python tests/scripts/nanogpt.py"""

from pydoc_data.topics import topics

import torch
from torch import nn

WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 32, 4, 2, 16, 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, characters):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters, bias=False)
        self.head.weight = self.tokens.weight
        self.loss = nn.CrossEntropyLoss()
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, x, targets):
        x = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        return self.loss(self.head(self.norm(self.blocks(x))).flatten(0, 1), targets.flatten())


def main(convert=lambda model: model, optimizer=torch.optim.AdamW, steps=200):
    torch.manual_seed(0)
    text = "".join(topics[name] for name in sorted(topics))[:100_000]
    alphabet = sorted(set(text))
    data = torch.tensor([alphabet.index(c) for c in text])
    model = GPT(len(alphabet))
    convert(model)
    opt = optimizer(model.parameters(), lr=1e-3, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        window = data[torch.randint(len(data) - CONTEXT, (BATCH, 1)) + torch.arange(CONTEXT + 1)]
        loss = model(window[:, :-1], window[:, 1:])
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(*main()[::20])
