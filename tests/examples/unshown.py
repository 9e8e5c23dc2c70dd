"""Names of payees that a phone does not show as they are."""

#: With an override of the direction; of letters and signs that show nothing; between others; and of a look-alike.
UNSHOWN = (
    *("\N{RIGHT-TO-LEFT OVERRIDE}ecilA", "\N{HANGUL FILLER}", "\N{BRAILLE PATTERN BLANK}"),
    *(
        "\N{COMBINING GRAPHEME JOINER}",
        "\N{VARIATION SELECTOR-16}",
        "\N{VARIATION SELECTOR-17}",
        "\N{ZERO WIDTH SPACE}",
    ),
    *("Alice\N{HANGUL FILLER}", "Alice\N{VARIATION SELECTOR-16}Ltd", "\N{CYRILLIC CAPITAL LETTER A}lice"),
)
