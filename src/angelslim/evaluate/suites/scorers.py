"""The scores of RULER and LongBench, from 0 to 1: definitions as published, code of our own.

RULER: the share of the references that a reply contains (`string_match_all`), or whether it contains any
(`string_match_part`). LongBench (arXiv 2308.14508): F1 over words, ROUGE-L, the share of named classes or numbers that are
right, similarity of a line of code. Its Chinese tasks cut words with jieba (the extra `longbench`).

ROUGE-L is that of the package `rouge`, which LongBench calls: sentences end at full stops, and the words of the longest
common subsequences of all pairs of sentences are counted once each, as are the words of both texts. Code similarity is
the share of characters in the longest common subsequence of both lines, twice over their lengths, as the fuzzy
matchers with a C extension compute it, rounded to percent.
"""

from __future__ import annotations

import importlib.util
import re
import string
from collections import Counter
from collections.abc import Sequence

from ...base.errors import MissingExtra
from .base import Sample

CHINESE_SIGNS = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟"
    "〰〾〿–—‘’‛“”„‟…‧﹏."
)


def string_match_all(reply: str, sample: Sample) -> float:
    """Return the share of the references that the reply contains, whatever their case."""
    return sum(answer.lower() in reply.lower() for answer in sample.answers) / len(sample.answers)


def string_match_part(reply: str, sample: Sample) -> float:
    """Return 1 if the reply contains any of the references."""
    return float(any(answer.lower() in reply.lower() for answer in sample.answers))


def qa_f1(reply: str, answer: str) -> float:
    """Return F1 over words, without case, punctuation and articles."""
    return f1(_words(reply), _words(answer))


def qa_f1_zh(reply: str, answer: str) -> float:
    """Return F1 over Chinese words without punctuation."""
    signs = set(string.punctuation + CHINESE_SIGNS)

    def words(text: str) -> list[str]:
        clean = (
            "".join("".join(sign for sign in word.lower() if sign not in signs).split()) for word in cut(text)
        )
        return [word for word in clean if word]

    return f1(words(reply), words(answer))


def f1(reply: Sequence[str], answer: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall of a bag of words."""
    same = sum((Counter(reply) & Counter(answer)).values())
    if not same:
        return 0.0
    precision, recall = same / len(reply), same / len(answer)
    return 2 * precision * recall / (precision + recall)


def rouge_l(reply: str, answer: str) -> float:
    """Return the F-measure of ROUGE-L over sentences."""
    hypothesis, reference = _sentences(reply), _sentences(answer)
    if not hypothesis or not reference:
        return 0.0
    shared: set[str] = set()
    for one in reference:
        for other in hypothesis:
            shared |= set(subsequence(one, other))
    recall = len(shared) / len({word for line in reference for word in line})
    precision = len(shared) / len({word for line in hypothesis for word in line})
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_l_zh(reply: str, answer: str) -> float:
    """Return ROUGE-L over Chinese words."""
    return rouge_l(" ".join(cut(reply)), " ".join(cut(answer)))


def classification(reply: str, answer: str, classes: Sequence[str]) -> float:
    """Return one over the number of classes that the reply names if the right one is among them.

    A named class that is only a part of the right one's name does not count against it, except where the published
    rule skips it: of two such neighbours in the list, the second stays.
    """
    named = [name for name in classes if name in reply]
    position = 0
    while position < len(named):  # removing moves the rest, and the next one is passed over
        if named[position] in answer and named[position] != answer:
            del named[position]
        position += 1
    return 1 / len(named) if answer in named else 0.0


def number_share(reply: str, answer: str) -> float:
    """Return the share of the numbers in the reply that are the one in the answer."""
    wanted = re.findall(r"\d+", answer)
    numbers = re.findall(r"\d+", reply)
    return sum(number == wanted[0] for number in numbers) / len(numbers) if numbers and wanted else 0.0


def code_similarity(reply: str, answer: str) -> float:
    """Compare the reply's first line that is neither a comment nor a fence with the answer."""
    lines = reply.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(sign in line for sign in ("`", "#", "//"))), "")
    both = len(line) + len(answer)
    return round(100 * 2 * len(subsequence(line, answer)) / both) / 100 if line and answer else 0.0


def subsequence(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """Return a longest common subsequence; among equals the one whose elements come from the back of `other`."""
    rows = [[0] * (len(other) + 1)]
    for item in one:
        above, row = rows[-1], [0]
        for column, candidate in enumerate(other):
            row.append(above[column] + 1 if item == candidate else max(above[column + 1], row[column]))
        rows.append(row)
    found, i, j = [], len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            found.append(one[i - 1])
            i, j = i - 1, j - 1
        elif rows[i - 1][j] > rows[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]


def check_chinese() -> None:
    """Refuse to score Chinese answers without the package that cuts them into words."""
    if importlib.util.find_spec("jieba") is None:
        raise MissingExtra("jieba", "longbench", "Scoring Chinese answers")


def cut(text: str) -> list[str]:
    """Cut Chinese text into words."""
    check_chinese()
    import jieba  # type: ignore[import-not-found,import-untyped,unused-ignore]

    jieba.setLogLevel("WARNING")  # it says on stderr that it loads its dictionary
    words: list[str] = jieba.lcut(text, cut_all=False)
    return words


def _words(text: str) -> list[str]:
    signs = set(string.punctuation)
    plain = "".join(sign for sign in text.lower() if sign not in signs)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _sentences(text: str) -> list[list[str]]:
    """The words of each sentence; two full stops in a row leave none between them, one of blanks an empty word."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]
