"""The panels of `mimo demo --web` as HTML: what the prompt is made of, how drafting goes, what the cache holds."""

from html import escape

from modeling_mimo.processors.token_layout_mimo_v2 import Segment, TokenLayout

from .demo_web_session import CacheUse, Drafting


# characters of a text that a line of the layout shows
SNIPPET = 90
KINDS = ("text", "image", "video", "audio", "padding")
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def layout_panel(layout: TokenLayout | None) -> str:
    """A strip of all tokens in the colours of their kinds, and a line per segment."""
    if layout is None:
        return panel("layout", "Token layout", "", '<div class="quiet">what the next prompt is made of</div>')
    (row,) = layout.rows
    counts = {kind: sum(segment.tokens for segment in row if segment.kind == kind) for kind in KINDS}
    found = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
    strip = "".join(
        f'<i class="{segment.kind}" style="flex: {segment.tokens} 0 0" title="{escape(title(segment))}"></i>'
        for segment in row
    )
    lines = "".join(layout_line(segment) for segment in row)
    return panel(
        "layout",
        "Token layout",
        f"{sum(counts.values()):,} tokens: {found}",
        f'<div class="strip">{strip}</div><div class="scroll"><table>{lines}</table></div>',
    )


def title(segment: Segment) -> str:
    tokens, count, what, *_ = segment.cells()
    return f"{what}: tokens {tokens} ({count})"


def layout_line(segment: Segment) -> str:
    tokens, count, what, grid, patches, seconds, _ = segment.cells()
    if segment.kind == "text":
        half = SNIPPET // 2
        long = len(segment.text) > SNIPPET
        detail = f"{segment.text[:half]} … {segment.text[-half:]}" if long else segment.text
        detail = detail.replace("\n", "⏎")
    else:
        facts = (f"at {seconds}" if seconds else "", grid, f"{patches} patches" if patches else "")
        detail = ", ".join(fact for fact in facts if fact)
    return (
        f'<tr><td><span class="dot {segment.kind}"></span>{escape(what)}</td><td class="number">{count}</td>'
        f'<td class="quiet">{tokens}</td><td class="wide">{escape(detail)}</td></tr>'
    )


def drafting_panel(drafting: Drafting | None, compared: dict[bool, Drafting], heads: int) -> str:
    """The answer that is written or was last, drafts per head, and the last answers with and without drafts."""
    if not heads:
        return panel("drafting", "Drafting", "", '<div class="quiet">this checkpoint has no MTP heads</div>')
    shown = drafting or Drafting(on=True)
    facts = [
        ("tokens per step", f"{shown.accepted_length:.2f}" if shown.steps else "—"),
        ("tokens/s", f"{shown.tokens_per_second:,.0f}" if shown.tokens_per_second else "—"),
        ("tokens", f"{shown.tokens:,}" if shown.tokens else "—"),
        ("steps", f"{shown.steps:,}" if shown.steps else "—"),
    ]
    numbers = "".join(f"<div><b>{value}</b><span>{escape(name)}</span></div>" for name, value in facts)
    rows = "".join(
        bar_row(f"head {head + 1}", [("taken", part(shown.accepted, shown.proposed, head))], taken_of(shown, head))
        for head in range(heads)
    )
    note = "last answer drafted" if shown.on else "last answer not drafted"
    return panel(
        "drafting",
        "Drafting with MTP heads",
        note if drafting else "",
        f'<div class="facts">{numbers}</div><div class="rows">{rows}{comparison(compared)}</div>',
    )


def part(accepted: tuple[int, ...], proposed: tuple[int, ...], head: int) -> float:
    return accepted[head] / proposed[head] if head < len(proposed) and proposed[head] else 0.0


def taken_of(drafting: Drafting, head: int) -> str:
    if head >= len(drafting.proposed) or not drafting.proposed[head]:
        return "—"
    return f"{drafting.accepted[head]} of {drafting.proposed[head]} taken"


def comparison(compared: dict[bool, Drafting]) -> str:
    """Bars for the speed of the last answers with and without drafts, once there are both."""
    if len(compared) < 2:
        return ""
    fastest = max(answer.tokens_per_second for answer in compared.values())
    return "".join(
        bar_row(
            f"drafts {'on' if on else 'off'}",
            [("global" if on else "whole", compared[on].tokens_per_second / fastest)],
            f"{compared[on].tokens_per_second:,.0f} tokens/s",
        )
        for on in (True, False)
    )


def cache_panel(use: CacheUse) -> str:
    """Bars of one scale: what the layers hold, and what they would hold if each kept every token."""
    if not use.tokens:
        return panel("cache", "KV cache", "", '<div class="quiet">empty</div>')
    held = use.global_bytes + use.sliding_bytes
    scale = max(held, use.all_global)
    rows = bar_row(
        "held", [("global", use.global_bytes / scale), ("sliding", use.sliding_bytes / scale)], size(held)
    ) + bar_row("all global", [("whole", use.all_global / scale)], size(use.all_global))
    legend = (
        f'<span class="dot global"></span>global layers {size(use.global_bytes)} &nbsp; '
        f'<span class="dot sliding"></span>sliding layers {size(use.sliding_bytes)}'
        f" &nbsp; allocated {size(use.allocated)}"
    )
    return panel(
        "cache",
        "KV cache",
        f"{use.tokens:,} tokens, {use.all_global / held:.1f} times less",
        f'<div class="rows">{rows}</div><div class="quiet under">{legend}</div>',
    )


def bar_row(name: str, parts: list[tuple[str, float]], value: str) -> str:
    """A line of a grid of three columns; `parts`: class and share of the bar, 0 to 1."""
    filled = "".join(f'<i class="{kind}" style="width: {100 * share:.1f}%"></i>' for kind, share in parts)
    return f'<span>{escape(name)}</span><div class="bar">{filled}</div><span>{escape(value)}</span>'


def panel(kind: str, heading: str, note: str, body: str) -> str:
    return f'<div class="panel {kind}"><h3>{escape(heading)}<small>{escape(note)}</small></h3>{body}</div>'


def notice(text: str, is_error: bool = False) -> str:
    """One line under the conversation."""
    return f'<span class="{"error" if is_error else "said"}" role="status">{escape(text)}</span>' if text else ""


def size(count: float) -> str:
    """`count` bytes with a unit, e.g. "12.3 KiB"."""
    unit = 0
    while count >= 1024 and unit < len(UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:,.1f} {UNITS[unit]}" if unit else f"{count} B"
