"CaseOps against the record's own strings where they are at hand, and on any text"
import json

import pytest
from hypothesis import given, strategies as st

from pgolf.text.caseops import MARKS, CaseOpsError, case_bytes, mark_case, unmark_case

TEXTS = st.text(st.one_of(st.sampled_from("aAbBzZ .1éÉß" + "".join(MARKS)), st.characters(exclude_categories=("Cs",))))


@given(TEXTS)
def test_every_text_comes_back(text):
    marked = mark_case(text)
    assert unmark_case(marked) == text and not any("A" <= c <= "Z" for c in marked)


@given(TEXTS, st.lists(st.integers(0, 200), max_size=6))
def test_bytes_add_up_whatever_the_cuts(text, places):
    marked = mark_case(text)
    edges = sorted({0, len(marked), *(p for p in places if p < len(marked))})
    pieces = [marked[a:b] for a, b in zip(edges, edges[1:])]
    assert sum(case_bytes(pieces)) == len(text.encode())


def test_the_records_strings(golden):
    record = json.loads((golden / "frontier" / "caseops.json").read_text())
    for s in record["strings"]:
        assert mark_case(s["text"]) == s["transformed"] and unmark_case(s["transformed"]) == s["text"]
        assert case_bytes(s["cut"]) == s["cut_bytes"] and case_bytes(s["surfaces"]) == s["piece_bytes"]
    for s in [*record["malformed"], *(s for s in record["unusual"] if s.get("error"))]:
        with pytest.raises(CaseOpsError):
            unmark_case(s["text"])
    assert [unmark_case(s["text"]) for s in record["unusual"] if "decoded" in s] == [
        s["decoded"] for s in record["unusual"] if "decoded" in s]
