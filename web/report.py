"""A result as one HTML file that needs nothing else: for mail, tickets and archives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from web.assets import STATIC
from web.pages import render
from web.view import result_view


def render_report(result: Mapping[str, Any]) -> str:
    """The result page with its style inside (`result`: plain values, as `--json` writes them)."""
    style = (STATIC / "planfront.css").read_text(encoding="utf-8")
    return render("report.html", r=result_view(result), style=Markup(style))
