"""Questions on generated documents, in the place of RULER's two question answering tasks.

RULER hides paragraphs of SQuAD and HotpotQA among others. Both are downloads, so these documents are written here: short
reports on people and companies with invented names, padded with sentences of a local text. One question needs one document
(`facts_1`, for qa_1), or two of them, the person's and the company's (`facts_2`, for qa_2). Wording of the prompt and score
are RULER's.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from ...data.statements import key_words
from .base import Build, Sample

QUESTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\nThe "
    "following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me the "
    "answer and do not output any other words.\n\nQuestion: {query}"
)
PREFIX = " Answer:"
TRADES = ("baker", "carpenter", "doctor", "engineer", "gardener", "lawyer", "painter", "pilot", "teacher")
SENTENCES = 4  # of other text in a document


def documents(sentences: Sequence[str], hops: int) -> Build:
    """Return the builder of questions over `hops` documents; size counts documents."""
    names = [word.capitalize() for word in key_words(4096)]

    def build(rng: random.Random, size: int) -> Sample | None:
        people = max(size // hops, 1)
        if 3 * people > len(names):
            return None
        drawn = rng.sample(names, 3 * people)
        person, company, city = drawn[::3], drawn[1::3], drawn[2::3]
        facts = []
        for who, firm, place in zip(person, company, city, strict=True):
            job = f"{who} is a {rng.choice(TRADES)}"
            if hops == 1:
                facts.append(f"{job} and was born in {place}.")
            else:
                facts += [f"{job} and works for {firm}.", f"{firm} has its main office in {place}."]
        asked = rng.randrange(people)
        rng.shuffle(facts)
        texts = [_padded(rng, fact, sentences) for fact in facts]
        context = "\n\n".join(f"Document {index + 1}:\n{text}" for index, text in enumerate(texts))
        query = (
            f"In which city was {person[asked]} born?"
            if hops == 1
            else f"In which city is the main office of the company that {person[asked]} works for?"
        )
        return Sample(QUESTION.format(context=context, query=query), (city[asked],), PREFIX)

    return build


def _padded(rng: random.Random, fact: str, sentences: Sequence[str]) -> str:
    begin = rng.randrange(len(sentences))
    around = [sentences[(begin + index) % len(sentences)] for index in range(SENTENCES)]
    around.insert(rng.randint(0, SENTENCES), fact)
    return " ".join(around)
