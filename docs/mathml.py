"""A hook of mkdocs: equations become MathML when the site is built, so that browsers draw them without a script."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex (generic) makes of $...$ and of $$...$$.
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """The page with MathML in place of TeX."""
    content = _INLINE.sub(lambda match: convert(html.unescape(match[1])), content)
    return _BLOCK.sub(lambda match: convert(html.unescape(match[1]), display="block"), content)
