"""The words that pages are written with, and the list of those that the tower learns by name."""

from __future__ import annotations

from typing import Final


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


COLORS: Final = _split(
    """
    red orange yellow green blue purple pink brown gray black
    """
)
SHAPES: Final = _split(
    """
    circle square triangle diamond star hexagon cross ring arrow heart moon rectangle
    """
)
WORDS: Final = _split(
    """
    apple bread river stone cloud light paper glass metal water table chair house garden window door street
    bridge market school office church castle forest mountain valley island ocean beach desert field flower
    grass tree leaf root seed fruit lemon orange banana cherry grape melon peach pear plum tomato potato
    carrot onion pepper garlic rice wheat corn sugar salt honey butter cheese milk coffee tea juice wine
    soup salad dinner lunch morning evening night summer winter spring autumn monday friday sunday january
    march april june july august october music song dance story book letter word page pencil brush paint
    color picture camera mirror clock watch lamp candle fire smoke rain snow wind storm sun moon star planet
    earth world city town village road path train plane boat ship car truck bus wheel engine motor bicycle
    horse dog cat bird fish bear wolf lion tiger monkey rabbit mouse snake frog spider bee ant cow sheep
    goat pig duck goose chicken eagle owl dragon king queen prince knight soldier doctor nurse teacher
    student farmer baker driver pilot sailor writer artist singer player friend family mother father sister
    brother child baby woman man people crowd group team club party game sport ball goal race prize gold
    silver copper iron steel wood plastic cotton silk wool leather shirt coat dress shoe hat glove ring
    chain key lock box bag basket bottle cup plate bowl knife fork spoon pot pan oven stove bed pillow
    blanket carpet curtain floor wall roof ceiling stair corner room kitchen bath tower gate fence hill lake
    pond stream cave cliff rock sand dust mud ice flame heat cold warm soft hard heavy quick slow early late
    young old new fresh clean dirty empty full open closed quiet loud bright dark deep shallow wide narrow
    long short tall small large round flat sharp smooth rough sweet bitter sour dry wet rich poor strong
    weak happy sad angry calm brave kind proud clever simple strange common rare famous secret public modern
    ancient local foreign north south east west left right center top bottom front back inside outside above
    below near far before after always never often seldom today tomorrow again begin finish follow carry
    build break catch throw climb swim walk run jump fall stand sit sleep wake dream think learn teach read
    write speak listen taste touch smell laugh smile cry sing play work rest travel visit arrive leave
    return send receive buy sell pay trade borrow lend save spend count measure weigh order deliver pack
    plan report notice number total price amount value result reason answer question problem idea fact truth
    plant machine tool hammer nail screw rope wire pipe tank pump valve fuel power energy signal radio phone
    screen button battery circuit sensor robot rocket orbit space comet crater laser magnet crystal mineral
    marble pearl ruby emerald amber velvet ribbon puzzle riddle magic mystery journey harbor anchor sail
    captain pirate treasure map compass lantern shadow whisper thunder lightning rainbow meadow orchard
    vineyard barn stable saddle bridle harvest barrel cellar attic chimney balcony
    """
)
FIRST_NAMES: Final = _split(
    """
    Anna Ben Carl Dora Emma Frank Grace Henry Irene Jack Karen Leo Maria Nina Oscar Paul Rosa Sam Tina
    Victor Wendy Adam Betty Clara David Elena Felix Gina Hugo Ivan Julia Kevin Laura Martin Nora Olga Peter
    Ruth Simon Thomas Alice Bruno
    """
)
LAST_NAMES: Final = _split(
    """
    Smith Jones Brown Taylor Wilson Davies Evans Walker Wright Green Hall Wood Clark Baker Turner Hill
    Cooper Ward Moore King Lee Scott Young Allen Carter Parker Morris Rogers Reed Cook Bell Murphy Bailey
    Kelly Price Gray Fisher Stone Lopez Weber
    """
)
CITIES: Final = _split(
    """
    Paris London Berlin Madrid Rome Vienna Dublin Oslo Prague Lisbon Athens Warsaw Boston Denver Dallas
    Miami Chicago Seattle Toronto Sydney Tokyo Seoul Delhi Cairo Lima Geneva Milan Munich Porto Bergen
    """
)
MONTHS: Final = _split(
    """
    January February March April May June July August September October November December
    """
)
COMPANIES: Final = _split(
    """
    Acme Globex Initech Umbra Vertex Orion Nimbus Zenith Apex Delta Nova Pioneer Summit Atlas Quantum Falcon
    Horizon Cobalt Crimson Beacon
    """
)
COMPANY_ENDINGS: Final = _split(
    """
    Ltd Inc Group Corp Works Labs Foods Media Bank Tools
    """
)
STATES: Final = _split(
    """
    paid open closed pending late sent shipped active draft approved
    """
)
PRODUCTS: Final = _split(
    """
    lamp chair table clock mirror shelf carpet pillow kettle toaster blender camera printer laptop tablet
    phone speaker jacket shirt shoes scarf wallet bottle basket hammer drill ladder pencil notebook stapler
    guitar piano violin
    """
)
FRUITS: Final = _split(
    """
    Apple Lemon Orange Banana Cherry Grape Melon Peach Pear Plum Tomato Potato Carrot Onion Pepper Rice Corn
    """
)
TITLES: Final = _split(
    """
    Invoice Receipt Order Statement Ticket Notice Report Memo Letter Contract Permit Certificate Membership
    Reservation Delivery Payment Application Registration Summary Agenda
    """
)
SHORT_MONTHS: Final = tuple(month[:3] for month in MONTHS)
_TEMPLATES: Final = _split(
    """
    field row column item name date price sales results by for of the and
    """
)
_LABELS: Final = _split(
    """
    customer city phone due order no item qty total status room email ref account country agent payment tax
    code seat gate class discount shipping weight contact company member level branch units score rank age
    size stock visitors rainfall votes points year sales goals books cars trees hours miles cost profit team
    player product month day monday tuesday wednesday thursday friday saturday sunday time start end number
    invoice address street service
    """
)

NUMBERS: Final = _split("zero one two three four five six seven eight nine ten eleven twelve")
ORDINALS: Final = _split("first second third fourth fifth sixth seventh eighth ninth")

_KNOWN = (
    *(WORDS, FIRST_NAMES, LAST_NAMES, CITIES, MONTHS, SHORT_MONTHS, COMPANIES, COMPANY_ENDINGS),
    *(STATES, PRODUCTS, TITLES, _TEMPLATES, COLORS, SHAPES, _LABELS),
)
OTHER_WORD: Final = 1
KNOWN_WORDS: Final[dict[str, int]] = {
    word: index
    for index, word in enumerate(
        dict.fromkeys(["<none>", "<other>", *(word.lower() for words in _KNOWN for word in words)])
    )
}
"""Number of each word that a patch may be labelled with; 0 is none, `OTHER_WORD` any that is not listed."""


def known_word(word: str) -> int:
    """The number of a word as it is written on a page, with its punctuation and capitals."""
    return KNOWN_WORDS.get(word.strip(".,:;!?()\"'").lower(), OTHER_WORD)


def with_article(noun: str) -> str:
    """`a red star`, `an orange star`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def listed(items: list[str]) -> str:
    """`a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
