"""The words of the generated problems: names, things, and the paraphrases of each sentence. No logic.

`[[equation]]` in a step's sentence is filled last, when the numbers are known. Every sentence that matters to
the solution carries a label (a day, a place in a row), by which the solution finds it again.
"""

NAMES = (
    *(
        "Ada",
        "Amir",
        "Ana",
        "Ben",
        "Carl",
        "Carmen",
        "Cleo",
        "Dana",
        "David",
        "Dora",
        "Emil",
        "Emma",
        "Eva",
        "Felix",
    ),
    *(
        "Gita",
        "Hana",
        "Hugo",
        "Ida",
        "Ivan",
        "Jack",
        "Jana",
        "Kai",
        "Kim",
        "Lea",
        "Leo",
        "Lina",
        "Max",
        "Mei",
        "Mina",
    ),
    *("Noah", "Nora", "Omar", "Paul", "Petra", "Ravi", "Rosa", "Sam", "Sara", "Tom", "Vera"),
)
THINGS = (
    *(
        "apples",
        "books",
        "coins",
        "cards",
        "shells",
        "stamps",
        "marbles",
        "pencils",
        "stones",
        "tickets",
        "cookies",
    ),
    *(
        "eggs",
        "flowers",
        "lemons",
        "nuts",
        "oranges",
        "pears",
        "photos",
        "stickers",
        "sweets",
        "beads",
        "buttons",
    ),
)
PACKS = ("boxes", "bags", "baskets", "packs", "jars")
CONTAINERS = ("box", "jar", "shelf", "bag", "basket", "drawer")
PLACES = ("shop", "stall", "counter", "market")
GOODS = (
    "pens",
    "caps",
    "cups",
    "plates",
    "lamps",
    "bowls",
    "rulers",
    "socks",
    "towels",
    "spoons",
    "mugs",
    "ropes",
)
MADE = ("chairs", "tables", "toys", "shirts", "clocks", "bricks", "dolls", "cakes", "vases", "bikes")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
MULTIPLES = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}

CLOSINGS = ("The answer is {answer}.", "So the answer is {answer}.", "Therefore the answer is {answer}.")
DISTRACTORS = (
    "{name} is {n} years old.",
    "The bus to the town takes {n} minutes.",
    "The street has {n} houses.",
    "{name} lives at number {n}.",
    "There are {n} people in the park.",
    "It is {n} degrees outside.",
)

EVENT_START = ("On {day} {name} has {n} {thing}.", "On {day} {name} owns {n} {thing}.")
GAIN = (
    "On {day} {name} buys {k} more.",
    "On {day} {other} gives {name} {k} {thing}.",
    "On {day} {name} finds {k} {thing}.",
    "On {day} {name} wins {k} {thing} in a game.",
)
LOSS = (
    "On {day} {name} gives {k} to {other}.",
    "On {day} {name} loses {k} of the {thing}.",
    "On {day} {other} takes {k} {thing} from {name}.",
    "On {day} {name} sells {k} {thing}.",
)
PACK_GAIN = (
    "On {day} {name} buys {m} {pack} with {k} {thing} each.",
    "On {day} {name} gets {m} {pack} of {k} {thing} each.",
)
PACK_LOSS = (
    "On {day} {name} sells {m} {pack} with {k} {thing} each.",
    "On {day} {name} loses {m} {pack} of {k} {thing} each.",
)
PACK_STEP = ("On {day} the {pack} hold [[equation]] {thing}.",)
GAIN_STEP = (
    "On {day} we add {k} and get [[equation]] {thing}.",
    "On {day} there are {k} more: [[equation]] {thing}.",
)
LOSS_STEP = (
    "On {day} we take away {k} and get [[equation]] {thing}.",
    "On {day} there are {k} fewer: [[equation]] {thing}.",
)
EVENT_ASK = ("How many {thing} does {name} have now?", "How many {thing} does {name} have in the end?")

RELATION_START = ("The first {box} holds {n} {thing}.", "There are {n} {thing} in the first {box}.")
TIMES = (
    "The {new} {box} holds {m} as many {thing} as the {known}.",
    "The {new} {box} holds {m} as many as the {known}.",
)
TIMES_STEP = ("The {new} {box} holds {m} as many: [[equation]] {thing}.",)
COMPARE = (
    "The {new} {box} holds {k} {way} {thing} than the {known}.",
    "The {new} {box} holds {k} {way} than the {known}.",
)
COMPARE_STEP = ("The {new} {box} holds {k} {way}: [[equation]] {thing}.",)
COMPARE_INVERTED = (
    "Compared with the {new} {box}, the {known} holds {k} {way} {thing}.",
    "Compared with the {new} {box}, the {known} holds {k} {way}.",
)
COMPARE_INVERTED_STEP = ("Compared with the {new} {box} it is {k} {way}: [[equation]] {thing}.",)
RELATION_ASK = ("How many {thing} does the {last} {box} hold?", "How many {thing} are in the {last} {box}?")

BUY = (
    "At the {nth} {place} {name} buys {count} {good} for {price} dollars each.",
    "At the {nth} {place} {name} takes {count} {good} at {price} dollars each.",
)
BUY_STEP = ("At the {nth} {place} the {good} cost [[equation]] dollars.",)
SPEND = (
    "At the {nth} {place} {name} spends {k} dollars.",
    "At the {nth} {place} {name} buys {good} for {k} dollars.",
    "At the {nth} {place} {name} pays a fee of {k} dollars.",
)
SPEND_STEP = (
    "At the {nth} {place} we add {k} and get [[equation]] dollars.",
    "At the {nth} {place} it is {k} dollars more: [[equation]] dollars.",
)
REFUND = (
    "At the {nth} {place} {name} gets {k} dollars back.",
    "At the {nth} {place} a friend pays {k} dollars of it.",
    "At the {nth} {place} a coupon takes {k} dollars off.",
)
REFUND_STEP = (
    "At the {nth} {place} we take away {k} and get [[equation]] dollars.",
    "At the {nth} {place} it is {k} dollars less: [[equation]] dollars.",
)
SHOPPING_ASK = ("How many dollars does {name} pay in the end?", "How much does {name} pay in all?")

WORK_DAY = (
    "On {day} {name} works {hours} hours and makes {rate} {thing} every hour.",
    "On {day} there are {hours} hours of work, with {rate} {thing} made every hour.",
)
LONG_DAY = (
    "On {day} {name} works {hours} hours before lunch and {more} hours after it, and makes {rate} {thing} every hour.",
    "On {day} there are {hours} hours of work before lunch and {more} hours after it, with {rate} {thing} "
    "made every hour.",
)
LONG_DAY_STEP = ("On {day} the work takes [[equation]] hours.",)
WORK_STEP = (
    "On {day} at {rate} {thing} an hour that is [[equation]] {thing}.",
    "On {day} we have [[equation]] {thing}.",
)
ARRIVE = (
    "On {day} a friend adds {k} {thing}.",
    "On {day} {k} new {thing} arrive.",
    "On {day} {name} makes {k} more.",
)
LEAVE = (
    "On {day} {k} of the {thing} break.",
    "On {day} {name} sells {k} of the {thing}.",
    "On {day} a shop takes {k} {thing}.",
)
WORK_ASK = ("How many {thing} does {name} have at the end?", "How many {thing} are left for {name}?")

ROADS = ("road", "path", "river", "track", "canal")
TRAVEL_START = (
    "On the first part of the {road} {name} covers {n} miles in {hours} hours.",
    "{name} takes {hours} hours for the first part of the {road}, which has {n} miles.",
)
PACE_STEP = ("On the first part an hour brings [[equation]] miles.",)
SAME_PACE = (
    "On the {nth} part {name} goes on for {hours} hours, as fast as before.",
    "The {nth} part takes {name} {hours} hours, at the same pace.",
)
SAME_PACE_STEP = ("On the {nth} part {hours} hours bring [[equation]] miles.",)
FURTHER = (
    "The {nth} part is {k} miles longer than the one before.",
    "On the {nth} part {name} covers {k} miles more than on the one before.",
)
FURTHER_STEP = ("On the {nth} part it is {k} more: [[equation]] miles.",)
SHORTER = (
    "The {nth} part is {k} miles shorter than the one before.",
    "On the {nth} part {name} covers {k} miles fewer than on the one before.",
)
SHORTER_STEP = ("On the {nth} part it is {k} fewer: [[equation]] miles.",)
TRAVEL_ASK = (
    "How many miles does {name} cover on the {nth} part?",
    "How long is the {nth} part for {name}, in miles?",
)

CROPS = ("plums", "melons", "beans", "cherries", "carrots", "figs", "onions")
CRATES = ("crates", "carts", "sacks", "barrels")
PICK = (
    "{name} picks {crop} from {rows} rows, {trees} from each.",
    "From each of {rows} rows {name} takes {trees} {crop}.",
)
PICK_STEP = ("The rows give [[equation]] {crop}.",)
SHARE = (
    "They go evenly into {n} {crate}.",
    "{name} shares them out evenly among {n} {crate}.",
)
SHARE_STEP = ("Each of the {crate} gets [[equation]] {crop}.",)
PUT_IN = (
    "The {nth} helper puts {k} more into each of the {crate}.",
    "Then the {nth} helper adds {k} {crop} to each of the {crate}.",
)
PUT_IN_STEP = ("With the {nth} helper it is {k} more: [[equation]] {crop}.",)
TAKE_OUT = (
    "The {nth} helper takes {k} out of each of the {crate}.",
    "Then the {nth} helper eats {k} {crop} from each of the {crate}.",
)
TAKE_OUT_STEP = ("With the {nth} helper it is {k} fewer: [[equation]] {crop}.",)
HARVEST_ASK = (
    "How many {crop} are in each of the {crate} now?",
    "How many {crop} does each of the {crate} hold in the end?",
)
