#!/usr/bin/env bash
# reasoning-gym 0.1.25: four scorers give full marks to a constant reply, and a full stop costs a right answer a third or
# half of its marks.
#
# A good guess: `score_answer` is 1.0 for a right answer and clearly less for a reply that holds none, so it can be the
# reward of a reinforcement learning as it is; and a full stop or white space around a right answer costs little.
#
# What happens (default configurations):
# - coin_flip: "0" gets 1.0 for every probability below 1. The printed numbers are compared by their common beginning,
#   and the length of that is divided by the length of the *shorter* one.
# - puzzle24: "1*2*3*4" gets 1.0 on every puzzle. The numbers must be four and lie in 1..10; that they are those of the
#   puzzle is not asked.
# - complex_arithmetic: "nan" gets 1.0 on every task: min(1.0, exp(-nan)) is 1.0 in Python.
# - game_of_life_halting: any text gets 1.0: bool(answer) == bool(entry["answer"]), both of them non-empty strings.
# - propositional_logic: "P ∨ Q" gets 1.0 on most tasks (it does follow from most premises): a constant wins them.
# - game_of_life: a board of dead cells gets 0.9 and more of the marks on average.
# - gcd and others: "7." for "7" gets 0.5; syllogism: "Yes." 0.75.
# - boxnet and prime_factorization raise TypeError and ValueError on the reply "0" and "banana"; others return 0.
#
# Who is hurt: whoever rewards or measures by these scorers. A policy that writes a constant is at the best reward.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q reasoning-gym==0.1.25
"$folder/venv/bin/python" - <<'PY'
import contextlib, io, json
import reasoning_gym

def scores(name, reply, size=30):
    with contextlib.redirect_stdout(io.StringIO()):
        data = reasoning_gym.create_dataset(name, size=size, seed=1)
        items = [data[i] for i in range(size)]
        return items, [float(data.score_answer(answer=reply(item), entry=item)) for item in items]

def constant(name, reply, least):
    _, got = scores(name, lambda item: reply)
    mean = sum(got) / len(got)
    print(f"{name}: the constant reply {reply[:30]!r} gets {mean:.3f} on average, full marks on {sum(g >= 1 for g in got)} of {len(got)}")
    assert mean >= least, "the behaviour has changed"

items, got = scores("coin_flip", lambda item: "0")
below = [g for item, g in zip(items, got) if float(item["answer"]) < 1]
print(f"coin_flip: '0' gets {set(below)} on {len(below)} of {len(items)} items, those whose probability is below 1")
assert set(below) == {1.0}
constant("puzzle24", "1*2*3*4", 1.0)
constant("complex_arithmetic", "nan", 1.0)
constant("game_of_life_halting", "banana", 1.0)
constant("propositional_logic", "P ∨ Q", 0.6)
constant("game_of_life", json.dumps([[0] * 10] * 10), 0.85)
for name in ("gcd", "syllogism"):
    items, got = scores(name, lambda item: item["answer"] + ".")
    print(f"{name}: a right answer with a full stop gets {min(got):.2f} to {max(got):.2f}")
    assert max(got) < 1
for name, reply, kind in (("boxnet", "0", TypeError), ("prime_factorization", "banana", ValueError)):
    try:
        scores(name, lambda item: reply, 1)
    except kind as error:
        print(f"{name}: the reply {reply!r} raises {type(error).__name__}: {error}")
    else:
        raise SystemExit("the behaviour has changed")
PY
