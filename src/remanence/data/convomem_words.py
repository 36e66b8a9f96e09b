"""The sentences that the template generator of ConvoMem items writes and that its solver reads back: subjects, slots, wishes, circumstances, small talk.

Every table is ours. A subject has two names that share no word with each other ("our book club", "the evenings when we read together"), every slot has
sentences that name it and sentences that do not, and requests share hardly a word with the wishes that they call for: as in talk, a question is rarely put
in the words of the evidence.
"""

from __future__ import annotations

_NAMES = """
Ada Bela Carla Dario Edda Femi Gita Hugo Ines Jonas Kira Liam Mona Nils Oona Pavel Quinn Rosa Sven Tilda Uma Viktor Wanda Xenia Yusuf Zora
Amir Bruno Clara Dora Emil Flora Goran Hanna Igor Jana Karim Lena Marek Nora Omar Petra Ravi Selma Timo Vera
"""
PEOPLE = tuple(_NAMES.split())
OWNERS = ("our", "my sister's", "my neighbour's", "my manager's", "my cousin's", "my flatmate's")
BEHIND = {  # the owner in the other name
    "our": "we",
    "my sister's": "my sister and her friends",
    "my neighbour's": "the people next door",
    "my manager's": "my manager and the team",
    "my cousin's": "my cousin and her husband",
    "my flatmate's": "my flatmate and his band",
}
SUBJECTS = (  # a name, and another one with no word in common
    ("book club", "the evenings when {who} read together"),
    ("garden party", "the afternoon outdoors that {who} prepare"),
    ("kitchen rebuild", "the work on the cooking area that {who} began"),
    ("charity run", "the race for a good cause that {who} organise"),
    ("photo exhibition", "the show of pictures that {who} put up"),
    ("cycling trip", "the ride through the hills that {who} plan"),
    ("language course", "the Portuguese lessons that {who} take"),
    ("housewarming", "the first gathering in the new flat that {who} give"),
    ("flea market", "the sale of old things that {who} run"),
    ("choir concert", "the performance at which {who} sing"),
    ("wedding", "the big day that {who} look forward to"),
    ("chess tournament", "the boards and clocks weekend that {who} host"),
    ("podcast", "the recordings that {who} publish"),
    ("camping weekend", "the nights in tents that {who} spend"),
    ("food truck", "the rolling lunch counter that {who} open"),
    ("theatre play", "the piece that {who} bring to the stage"),
)
SLOTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # slot -> values, sentences
    "budget": (
        ("400 euros", "650 euros", "900 euros", "1200 euros", "1700 euros", "2300 euros"),
        ("The budget for {s} is {v}.", "For {s} nobody should spend more than {v}."),
    ),
    "day": (
        ("March 3", "April 17", "May 9", "June 21", "July 30", "October 12"),
        ("The day of {s} is {v}.", "Keep {v} free, that is when {s} happens."),
    ),
    "place": (
        ("the old mill", "the harbour hall", "the north pavilion", "the school gym", "the river terrace", "the town library"),
        ("The place for {s} is {v}.", "Everyone meets at {v} when it comes to {s}."),
    ),
    "contact": (
        ("Beatrix Olsen", "Matteo Ricci", "Yara Haddad", "Ivo Novak", "Sunita Rao", "Felix Braun"),
        ("The contact for {s} is {v}.", "Write to {v} with any question on {s}."),
    ),
    "colour": (
        ("dark green", "pale yellow", "coral", "navy blue", "silver", "burgundy"),
        ("The colour for {s} is {v}.", "Everything around {s} will be kept in {v}."),
    ),
    "dish": (
        ("mushroom stew", "lemon tart", "lentil curry", "fish pie", "plum dumplings", "walnut bread"),
        ("The dish for {s} is {v}.", "I will cook {v} when {s} comes round."),
    ),
    "music": (
        ("a jazz trio", "old tango records", "a brass quartet", "Irish fiddles", "piano pieces", "a samba group"),
        ("The music for {s} is {v}.", "We will listen to {v} in the course of {s}."),
    ),
    "transport": (
        ("the night train", "two rented vans", "the ferry", "cargo bikes", "the tram line 4", "a shared taxi"),
        ("The transport for {s} is {v}.", "Getting to {s} works best with {v}."),
    ),
    "gift": (
        ("a silver whistle", "a map of the coast", "a box of teas", "a woollen blanket", "a fern in a pot", "a pocket telescope"),
        ("The gift for {s} is {v}.", "I wrapped up {v} to bring along to {s}."),
    ),
    "deadline": (
        ("the end of January", "the first Monday of June", "noon on Friday", "the tenth of August", "early November", "Easter Monday"),
        ("The deadline for {s} is {v}.", "All papers for {s} must be in by {v}."),
    ),
}
SAID = (  # by the assistant
    "I looked it up, the {slot} for {s} would be {v}.",
    "My suggestion for {s}: as the {slot}, take {v}.",
    "With {v} as the {slot}, {s} should turn out well.",
    "Having compared a few, I settled on {v} for the {slot} of {s}.",
    "You asked about {s}, and {v} is the {slot} that I found.",
    "Put {v} down as the {slot} if you want {s} to work.",
)
CHANGED = (
    "Change of plan, the {slot} for {s} is now {v}.",
    "Forget what I said before, for {s} the {slot} became {v}.",
    "It was decided last night that {s} gets {v} as the {slot}.",
    "We had to switch to {v}, the old {slot} no longer suits {s}.",
    "One more correction on {s}: make {v} the {slot}.",
    "By common vote {v} is from today the {slot} of {s}.",
)
WISHES: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {  # domain -> the request, and (a wish of the user's, what a good reply heeds)
    "lunch": (
        "Where should I take a guest for lunch on Friday?",
        (
            ("I stopped eating meat two years ago.", "no meat"),
            ("Loud rooms give me a headache.", "a quiet room"),
            ("I would rather sit outside than in.", "seats outside"),
            ("Anything with coriander tastes of soap to me.", "no coriander"),
            ("I never spend more than twenty euros on a meal.", "below twenty euros"),
            ("I always go for small family kitchens over chains.", "a family kitchen"),
        ),
    ),
    "holiday": (
        "Suggest something for my two free weeks in summer.",
        (
            ("I get seasick on any boat.", "no boats"),
            ("Heat above thirty degrees knocks me out.", "a cool region"),
            ("I want to fly as little as I can.", "no flights"),
            ("Museums are what I enjoy most in a new town.", "museums"),
            ("I sleep badly in shared rooms.", "a room of my own"),
            ("Crowded beaches are not for me.", "no crowded beaches"),
        ),
    ),
    "evening": (
        "What film could I put on tonight?",
        (
            ("Blood on the screen makes me look away.", "nothing bloody"),
            ("I fall asleep when something runs over two hours.", "under two hours"),
            ("Subtitles are fine, dubbing is not.", "not dubbed"),
            ("I have a weakness for heist stories.", "a heist"),
            ("I do not care for anything set in space.", "not in space"),
            ("Black and white pictures are my favourites.", "black and white"),
        ),
    ),
    "sport": (
        "Put together an exercise routine for me.",
        (
            ("I only ever train before breakfast.", "early mornings"),
            ("Gyms bore me, I like to be in a park.", "in a park"),
            ("Twenty minutes is all that I can bring myself to do.", "twenty minutes"),
            ("Jumping annoys the family downstairs.", "no jumping"),
            ("I like to move along with a video.", "with a video"),
            ("I own nothing but a mat and a rope.", "mat and rope"),
        ),
    ),
    "gear": (
        "Which laptop should I get?",
        (
            ("A fan that whirs drives me mad.", "silent"),
            ("I carry my things in a tiny bag.", "small and light"),
            ("I write long texts, so the keys matter to me.", "a good keyboard"),
            ("I refuse to buy new when used will do.", "refurbished"),
            ("My eyes tire on glossy displays.", "a matte screen"),
            ("I want to be able to change the battery on my own.", "an exchangeable battery"),
        ),
    ),
    "learning": (
        "How could I learn to play the guitar?",
        (
            ("I need another person in the room, apps do not work for me.", "with a teacher"),
            ("Theory first, that is how I understand things.", "theory first"),
            ("I give up when there is no test at the end.", "an exam as a goal"),
            ("Wednesdays are the only evenings I have.", "on Wednesdays"),
            ("Blues is the sound I am after.", "blues"),
            ("I cannot read notes and do not want to.", "without notes"),
        ),
    ),
}
CIRCUMSTANCES: tuple[tuple[str, str, str], ...] = (  # what happened, a request it bears on, what a good reply takes into account
    ("I broke my wrist on the ice.", "Draft a plan for my climbing session tomorrow.", "the broken wrist"),
    ("Our oven gave up last night.", "Give me a recipe for a cake this weekend.", "the oven is out of order"),
    ("My passport ran out in spring.", "Help me to book Istanbul for next week.", "the expired passport"),
    ("The doctor put me on antibiotics.", "Which wine goes with the roast tonight?", "the antibiotics"),
    ("I sold the car in winter.", "How do I get the wardrobe home from the shop?", "there is no car"),
    ("We took in a dog with a weak heart.", "Plan a hike over the ridge for all of us.", "the dog with a weak heart"),
    ("My lease ends in four weeks.", "Should I repaint the bedroom now?", "the lease that ends"),
    ("Since the concert I hear nothing on the left.", "Which headphones should I buy?", "the deaf left ear"),
    ("They cut my hours to three days.", "Can I afford the bigger flat?", "the cut working hours"),
    ("The baby wakes at five each morning.", "Shall I join the late quiz night?", "the baby that wakes at five"),
    ("I promised to give up sugar until Easter.", "What should I order at the pastry shop?", "no sugar until Easter"),
    ("The bridge to the island is closed for repairs.", "When must I leave for dinner on the island?", "the closed bridge"),
)
LINKS = ("lent me the tent", "fixed my bicycle", "fed my cat in May", "taught me to juggle", "sold me the piano", "drove me to the station")
LINKED = "{n} {link}."
TRAITS: tuple[tuple[str, str], ...] = (  # about somebody by name, and what a good reply minds
    ("{n} gets ill from peanuts.", "no peanuts"),
    ("{n} keeps away from alcohol.", "no alcohol"),
    ("{n} has to be in bed by nine.", "an early end"),
    ("{n} cannot climb stairs at the moment.", "no stairs"),
    ("{n} is afraid of dogs.", "no dogs"),
    ("{n} cannot stand candles of any kind.", "no candles"),
    ("{n} hears badly where many people talk.", "a small round"),
)
HOST = "What must I mind when I invite the person who {link}?"
ASK = "What is the {slot} of {s}?"
ASK_NOW = "What is the {slot} of {s} at the moment?"
ASK_ALL = "Sum up all that I told you about {s}."
ASK_SAID = "What {slot} did you name for {s}?"
ASK_SAID_ALL = "Sum up all that you found out for {s}."
CHAT_USER = (
    "Good morning, I have a minute before work.",
    "It rained all day here.",
    "I slept well for once.",
    "Let me think about that for a while.",
    "The coffee machine is making odd sounds again.",
    "I walked home along the canal today.",
    "That made me laugh.",
    "I have to go in a moment.",
    "What a week this has been.",
    "The neighbours are drilling, so I moved to the balcony.",
    "I finished the crossword in ten minutes.",
    "My phone is almost empty, I will be brief.",
    "There is a smell of bread in the whole street.",
    "I might take a nap later.",
)
CHAT_ASSISTANT = (
    "Noted, thank you.",
    "That sounds good, tell me more whenever you like.",
    "All right, I will keep it in mind.",
    "Of course, take your time.",
    "I am glad to hear that.",
    "Would you like me to write that down for you?",
    "Understood.",
    "Let me know if anything changes.",
    "Happy to help with the rest, too.",
    "That must have been quite something.",
)
