"""What is asked in `contrasts.py`: everyday questions that no pair, persona or calibration holds."""

from __future__ import annotations

QUESTIONS = (
    "What did your teacher say about the homework?",
    "Tell me about your last visit to the dentist.",
    "What is your opinion of long car rides?",
    "Describe the kitchen of your grandmother.",
    "What happened when you missed the bus?",
    "How do people in your village celebrate?",
    "What do you think of the new library?",
    "Tell me about your job.",
    "What do you do when you cannot sleep?",
    "Describe a person whom you admire.",
    "What is it like to grow old?",
    "How was the concert?",
    "Tell me about a time when you got lost.",
    "What should we do with the old garden?",
    "How do you like the soup?",
    "Describe the sea on a windy day.",
    "What do you think of your boss?",
    "Tell me about a gift that you gave to somebody.",
    "What is happening outside?",
    "How do you make a cup of tea?",
    "What kind of films do you watch?",
    "Tell me about the house across the road.",
    "What went wrong with the cake?",
    "How does one make friends in a big school?",
)

#: What is asked instead of every second question, where unsteered answers to the others never show the trait: strength
#: -1 would have nothing to take away.
INSTEAD = {
    "french-english": (
        "Parlez-moi de votre dernière visite chez le dentiste.",
        "Décrivez la cuisine de votre grand-mère.",
        "Comment fait-on la fête dans votre village ?",
        "Parlez-moi de votre travail.",
        "Décrivez une personne que vous admirez.",
        "Comment était le concert ?",
        "Que faire du vieux jardin ?",
        "Décrivez la mer un jour de grand vent.",
        "Parlez-moi d'un cadeau que vous avez offert à quelqu'un.",
        "Comment faites-vous une tasse de thé ?",
        "Parlez-moi de la maison d'en face.",
        "Comment se fait-on des amis dans une grande école ?",
    ),
    "questions-statements": (
        "Write five questions that one can ask a dentist.",
        "Write five questions about my grandmother's kitchen.",
        "Write five questions about how people celebrate in a village.",
        "Write five questions that one can ask about a job.",
        "Write five questions to a person whom you admire.",
        "Write five questions about a concert.",
        "Write five questions about an old garden.",
        "Write five questions about the sea.",
        "Write five questions about gifts.",
        "Write five questions about a cup of tea.",
        "Write five questions about the house across the road.",
        "Write five questions that children ask in a big school.",
    ),
}


def questions(contrast: str) -> list[str]:
    """What is asked for a contrast."""
    asked = list(QUESTIONS)
    if contrast in INSTEAD:
        asked[1::2] = INSTEAD[contrast]
    return asked
