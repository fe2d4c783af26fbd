"""Texts about places to eat, with several references each, and what other programs say of them."""

from __future__ import annotations

HYPOTHESES = [
    "The Blue Door is a cheap pub near the river, with a rating of 3 out of 5.",
    "The Corner House serves French food for \u00a320-25. It isn't family-friendly.",
    "Near Caf\u00e9 Sol there is a coffee shop called Two Lamps.",
    "Green Hall, Green Hall is an average-priced restaurant in the city centre!",
    "Cheap.",
    'Old Mill offers "moderate" prices & Italian dishes (children welcome).',
]
REFERENCES = [
    [
        "The Blue Door is a pub by the river that is cheap and rated 3 out of 5.",
        "A cheap pub near the river is The Blue Door. Its customer rating is 3 out of 5.",
        "Rated 3 out of 5, The Blue Door is a low-priced riverside pub.",
    ],
    [
        "The Corner House has French food in the \u00a320-25 range and is not family-friendly.",
        "French food at \u00a320-25 is served by The Corner House, which isn't for families.",
    ],
    ["Two Lamps is a coffee shop near Caf\u00e9 Sol."],
    [
        "Green Hall is an averagely priced restaurant in the city centre.",
        "In the centre of the city there is an average-priced restaurant named Green Hall.",
        "Green Hall: average prices, city centre.",
    ],
    ["Sun Bar is a cheap place to eat.", "A cheap meal can be had at Sun Bar."],
    [
        "Old Mill is a child friendly Italian restaurant with moderate prices.",
        "Families are welcome at Old Mill, where Italian dishes are moderately priced.",
    ],
]
