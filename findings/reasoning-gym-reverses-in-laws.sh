#!/usr/bin/env bash
# reasoning-gym 0.1.25: in family_relationships the reference answers the question the other way round for in-laws.
#
# A good guess: "What is Sarah to Elizabeth?" is answered by what Sarah is to Elizabeth, as it is for mothers, sons,
# wives, sisters and grandmothers.
#
# What happens: where the first person is married to the second one's child, the reference is what the *second* is to the
# first ("mother-in-law", "father-in-law"); "daughter-in-law" and "son-in-law" never occur. That is every seventh task of
# the default configuration.
#
# Who is hurt: a model that answers right is marked wrong, and one that is rewarded learns the reverse.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q reasoning-gym==0.1.25
"$folder/venv/bin/python" - <<'PY'
import re
from collections import Counter
import reasoning_gym

SIZE = 600
data = reasoning_gym.create_dataset("family_relationships", size=SIZE, seed=1)
answers, in_laws = Counter(), 0
for entry in (data[i] for i in range(SIZE)):
    story = entry["question"]
    spouse, parents = {}, {}
    for a, b, children in re.findall(r"(\w+) is married to (\w+)\.(?: They have (?:a child|children) called ([^.]*)\.)?", story):
        spouse[a], spouse[b] = b, a
        for child in re.findall(r"[A-Z]\w+", children):
            parents[child] = {a, b}
    first, second = entry["metadata"]["person1"], entry["metadata"]["person2"]
    answers[entry["answer"]] += 1
    if entry["answer"].endswith("-in-law"):
        # the second is a parent of the first one's spouse, so the first is a daughter-in-law or son-in-law
        assert second in parents.get(spouse.get(first), ()), story
        in_laws += 1
print(f"answers of {SIZE} tasks: {dict(answers)}")
assert in_laws > 0 and not {"daughter-in-law", "son-in-law"} & set(answers), "the behaviour has changed"
print(f"as described: {in_laws} of {SIZE} references are those of in-laws, and all of them are reversed")
PY
