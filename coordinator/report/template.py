"""HTML pages of reports, filled in by jinja2. Knows no report."""

from __future__ import annotations

import base64
from pathlib import Path

from edge_sdk.errors import ConfigError


def render(template: Path, page: object) -> str:
    """Return *template* filled in with `page`, as it calls that.

    Raises:
        ConfigError: jinja2 is missing.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ConfigError(
            "a report needs jinja2, which is missing: pip install 'edgesplit[coordinator]'"
        ) from error
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template(template.name).render(page=page)
