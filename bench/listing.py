"""`dlgpu-bench list` and `dlgpu-bench env`: what can be asked for, and on what it would run."""

from __future__ import annotations

import json
from typing import Any

import click

from .cases import OPS, Op
from .cli import unknown
from .environment import UsageError, choose_device, describe, find_gpu
from .providers import BOUNDS, PROVIDERS, absent, offered, version

__all__ = ["command", "env"]


def _dtypes(op: Op) -> list[str]:
    return [str(dtype).removeprefix("torch.") for dtype in op.dtypes]


def _described(op: Op) -> dict[str, Any]:
    return {
        "name": op.name,
        "equation": op.equation,
        "source": op.source,
        "shapes": {name: dict(shape) for name, shape in op.shapes.items()},
        "options": {name: list(choices) for name, choices in op.options.items()},
        "dtypes": _dtypes(op),
        "passes": list(op.passes),
        "providers": [
            name for name in PROVIDERS if name in op.functions or not offered(op, name, {}, op.passes[0])
        ],
    }


def _device() -> str:
    gpu = find_gpu()
    return "cuda" if gpu is not None and not gpu.problem else "cpu"


def _providers(device: str) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "what": provider.says,
            "version": version(provider),
            "absent": absent(provider, device),
            "bound": name in BOUNDS,
        }
        for name, provider in PROVIDERS.items()
    ]


@click.command("list")
@click.argument("ops", nargs=-1, metavar="[OP]...")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def command(ops: tuple[str, ...], as_json: bool) -> None:
    """The ops with their shapes, options and dtypes, and who they can be compared with; of one op, all that is known."""
    for name in ops:
        if name not in OPS:
            raise unknown("op", name, OPS)
    chosen = [OPS[name] for name in ops or OPS]
    providers = _providers(_device())
    if as_json:
        found = {"ops": [_described(op) for op in chosen], "providers": providers}
        click.echo(json.dumps(found, indent=1))
        return
    if ops:
        for op in chosen:
            _say_all(op)
        return
    width = max(len(op.name) for op in chosen)
    click.echo("Ops (dlgpu-bench list OP tells more)")
    for op in chosen:
        click.echo(f"  {op.name:<{width}}  {op.equation}")
        click.echo(f"  {'':<{width}}  {', '.join(op.shapes)}")
    click.echo("\nProviders (--vs)")
    wide = max(len(name) for name in PROVIDERS)
    for provider in providers:
        state = f"absent: {provider['absent']}" if provider["absent"] else provider["version"] or "installed"
        click.echo(f"  {provider['name']:<{wide}}  {provider['what']} ({state})")


def _say_all(op: Op) -> None:
    known = _described(op)
    click.echo(f"{op.name}: {op.equation}   [{op.source}]")
    for name, shape in op.shapes.items():
        click.echo(f"  --shape {name}: {', '.join(f'{key}={size}' for key, size in shape.items())}")
    for name, choices in op.options.items():
        first, *others = map(str, choices)
        rest = f" (default), or {', '.join(others)}" if others else ""
        click.echo(f"  --option {name}={first}{rest}")
    click.echo(f"  --dtype {', '.join(known['dtypes'])}")
    click.echo(f"  --pass {', '.join(op.passes)}")
    click.echo(f"  --vs {', '.join(name for name in known['providers'] if name != 'dlgpu')}")


@click.command("env")
@click.option("--json", "as_json", is_flag=True, help="As results files have it.")
def env(as_json: bool) -> None:
    """This machine and its software. No host name, user, path or environment variable."""
    gpu = find_gpu()
    try:
        device, why = choose_device("auto", gpu)
    except UsageError as error:
        device, why = "cpu", str(error)
    found = describe(device, why, gpu)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    width = max(map(len, found))
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {inner}" for key, inner in value.items())
        click.echo(f"{name:<{width}}  {'none' if value is None else value}")
