"""The text of a prompt that may hold HTML, as Beautiful Soup and Python's html.parser find it.

Invariant: the text is what ``BeautifulSoup(markup, "html.parser").text`` is with the installed Python, and the time is linear
in the length of the markup.  Python's parser before its correction of 2025 searches for the end of a tag, a comment or a
section from each beginning, every time to the end of the text; the one here remembers what it searched for in vain.  It
repairs no markup and knows nothing of captions.
"""

import html.parser
import re
import warnings
from collections.abc import Callable

import bs4
from bs4.builder._htmlparser import BeautifulSoupHTMLParser, HTMLParserTreeBuilder

# The expression of a start tag in html.parser from Python 3.4 until the correction, which needs no help.
_OLD_START_TAG = r"""
  <[a-zA-Z][^\t\n\r\f />\x00]*       # tag name
  (?:[\s/]*                          # optional whitespace before attribute name
    (?:(?<=['"\s/])[^\s/>][^\s/=>]*  # attribute name
      (?:\s*=+\s*                    # value indicator
        (?:'[^']*'                   # LITA-enclosed value
          |"[^"]*"                   # LIT-enclosed value
          |(?!['"])[^>\s]*           # bare value
         )
        \s*                          # possibly followed by a space
       )?(?:\s|/(?!>))*
     )*
   )?
  \s*                                # trailing whitespace
"""
_IS_OLD = getattr(html.parser, "locatestarttagend_tolerant", re.compile("")).pattern == _OLD_START_TAG

# Its parts.  None of them ever gives back what it took, apart from a value (see _Searches._end_of_value).
_NAME_OF_TAG = re.compile(r"[^\t\n\r\f />\x00]*")
_BEFORE_ATTRIBUTES = re.compile(r"[\s/]*")
_ATTRIBUTE = re.compile(r"""(?<=['"\s/])[^\s/>]""")  # its first letter
_NAME_OF_ATTRIBUTE = re.compile(r"[^\s/=>]*")
_EQUALS = re.compile(r"\s*(=+)(\s*)")
_QUOTED = re.compile(r"""'[^']*'|"[^"]*\"""")
_BARE = re.compile(r"[^>\s]*")
_BEHIND_ATTRIBUTE = re.compile(r"(?:\s|/(?!>))*")

TOO_LARGE = "the prompt's markup cannot be read (it names a character by thousands of digits); remove that number."
_SPACES = " \t\n\f\r"  # text of nothing else becomes one of them
_SECTION = re.compile(r"<!\[([-_.a-zA-Z0-9]*)")


def text_of(markup: str) -> str:
    """Returns the text between the tags, with entities decoded, without comments, scripts and styles.

    Raises:
      ValueError: the markup holds a declaration that the parser refuses, or a character number of thousands of digits.
    """
    if "<" not in markup and "&" not in markup:  # as Beautiful Soup leaves it
        return markup if markup.strip(_SPACES) else "\n" if "\n" in markup else markup[:1] and " "
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bs4.MarkupResemblesLocatorWarning)  # a prompt may look like a file name
        try:
            return bs4.BeautifulSoup(markup, builder=_Builder()).text
        except bs4.ParserRejectedMarkup as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(f"the prompt's markup cannot be read ({reason}); remove what begins with <![ in it.") from error
        except ValueError as error:
            raise ValueError(TOO_LARGE) from error


class _Builder(HTMLParserTreeBuilder):
    """Beautiful Soup's builder, with the parser below where Python's own takes quadratic time."""

    def feed(self, markup: str) -> None:  # type: ignore[override]
        super().feed(markup, _LinearParser if _IS_OLD else BeautifulSoupHTMLParser)


class _LinearParser(BeautifulSoupHTMLParser):
    """Python's parser before the correction, without its repeated searches; every method is one of html.parser's."""

    _searches: "_Searches | None" = None

    @property
    def searches(self) -> "_Searches":
        """What is known of the text being parsed, which html.parser shortens once, between its two passes."""
        if self._searches is None or self._searches.text is not self.rawdata:
            self._searches = _Searches(self.rawdata)
        return self._searches

    def check_for_whole_start_tag(self, i: int) -> int:
        end = self.searches.end_of_tag(i)
        following = self.rawdata[end : end + 2]
        if following[:1] == ">":
            return end + 1
        if following == "/>":
            return end + 2
        return -1 if re.match(r"[a-zA-Z=/]|\Z", following) else end

    def parse_comment(self, i: int, report: bool = True) -> int:
        return self.searches.once_in_vain("comment", lambda: super(_LinearParser, self).parse_comment(i, report))

    def parse_pi(self, i: int) -> int:
        return self.searches.once_in_vain("instruction", lambda: super(_LinearParser, self).parse_pi(i))

    def parse_endtag(self, i: int) -> int:
        return self.searches.once_in_vain("end tag", lambda: super(_LinearParser, self).parse_endtag(i))

    def parse_marked_section(self, i: int, report: bool = True) -> int:
        section = _SECTION.match(self.rawdata, i)
        kind = f"section {section[1].lower()}" if section else "section"
        return self.searches.once_in_vain(kind, lambda: super(_LinearParser, self).parse_marked_section(i, report))


class _Searches:
    """Searches in one text whose result holds for other places too, so that no part of it is read more than a few times."""

    def __init__(self, text: str):
        self.text = text
        self._in_vain: set[str] = set()  # kinds of constructs of which none ends any more
        self._runs: dict[re.Pattern[str], tuple[int, int]] = {}  # the last run of an expression: its places end alike
        self._after_name: dict[int, int] = {}  # end of a tag's name -> where the tag stops
        self._after_attribute: dict[int, int] = {}  # end of an attribute's name -> where the tag stops

    def once_in_vain(self, kind: str, parse: Callable[[], int]) -> int:
        """Returns the end of a construct, -1 where there is none; that is searched for once for each kind."""
        if kind in self._in_vain:
            return -1
        end = parse()
        if end < 0:
            self._in_vain.add(kind)
        return end

    def end_of_tag(self, i: int) -> int:
        """Returns where the expression of a start tag stops that begins at ``i``; tags that share an attribute end alike."""
        name_end = self._end_of_run(_NAME_OF_TAG, i + 2)  # behind "<" and a letter
        if name_end not in self._after_name:
            self._after_name[name_end] = self._end_of_attributes(_end(_BEFORE_ATTRIBUTES, self.text, name_end))
        return self._after_name[name_end]

    def _end_of_attributes(self, place: int) -> int:
        passed = []
        while _ATTRIBUTE.match(self.text, place):
            name_end = self._end_of_run(_NAME_OF_ATTRIBUTE, place + 1)
            if name_end in self._after_attribute:
                place = self._after_attribute[name_end]
                break
            passed.append(name_end)
            place = _end(_BEHIND_ATTRIBUTE, self.text, self._end_of_value(name_end))
        self._after_attribute.update(dict.fromkeys(passed, place))
        return place

    def _end_of_value(self, place: int) -> int:
        """Returns where an attribute's value ends, ``place`` where there is none.

        Behind a quotation mark that is never closed, the expression gives back a space or one of several equals signs.
        """
        equals = _EQUALS.match(self.text, place)
        if equals is None:
            return place
        start = equals.end()
        if self.text[start : start + 1] in ("'", '"'):
            quoted = _QUOTED.match(self.text, start)
            if quoted or equals[2]:
                return quoted.end() if quoted else start
            if len(equals[1]) == 1:
                return place
            start -= 1
        return self._end_of_run(_BARE, start)

    def _end_of_run(self, pattern: re.Pattern[str], start: int) -> int:
        first, end = self._runs.get(pattern, (0, -1))
        if not first <= start <= end:
            first, end = self._runs[pattern] = (start, _end(pattern, self.text, start))
        return end


def _end(pattern: re.Pattern[str], text: str, start: int) -> int:
    """Returns where a match ends that may be empty."""
    match = pattern.match(text, start)
    return match.end() if match else start
