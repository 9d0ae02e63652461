"""What a careful human marker would say of answers, as a table; the judge has to say the same."""

# ruff: noqa: E501

import pytest

from steerable.chains.tasks import judge

# A reference, what is the same answer, what is another one. Each answer is judged in a box and behind "The answer is".
SAME_OR_NOT = {
    # units: in parentheses, behind a space, in \text{}, left out
    "9 (apples)": (
        ["9", "9 apples", "9 (apples)", r"9\text{ apples}", r"9 \; \text{apples}", "9 apple", "9 red apples", "9.0", "9 Apples"]
        + ["9 (apple)", r"9\ \mathrm{apples}", "9 apples left", "9 apples in total", "9 more apples", r"9\,\text{(apples)}"],
        ["8", "8 apples", "9 oranges", "9 (pears)", "90 apples", r"9\text{ pears}", "$9", "9%", "apples", "9 or 10 apples"],
    ),
    "9": (
        ["9", "9 apples", "$9", "9 dollars", "9 (apples)", "9%", r"9^\circ", "9 km/h", "9 cm", "9 cm^2", "+9", "9 m"],
        ["19", "-9", "9x", "9 (x+1)", "9i", "9 dozen", "9 dozen eggs", "9 tenths", "9 (or 8)", "9 (not 8)", "9 (ab)", "9 halves", "9 a", "9ab", "9 sin x", "9 root two", "9 million", "9 mod 5", "9:00:01", "9 or 8", "9/2"],
    ),
    "9 (cookies)": (
        [r"9\ cookies", r"9~\text{cookies}", r"9\mathrm{~cookies}", r"\text{9 cookies}", "(9 cookies)", "**9 cookies**", r"9\;(\text{cookies})"]
        + [r"9 \textit{cookies}", "9 of the cookies", "x = 9 cookies", r"\text{Total} = 9", "3 + 6 = 9 cookies", "9cookies", "9 {cookies}"]
        + ["9-cookies", r"\underline{9}", "9 cookie(s)", "Total: 9", "9 cookies per person", "9 cookies each"],
        ["nine pears", "9 pieces", "9 cookies and 2 pears", "9 dozen cookies", r"3 + 6 = 8 cookies"],
    ),
    "9 (cookies/person)": (["9", "9 cookies", "9 cookies per person"], ["9 cookies per bag", "9 people"]),
    "3 (dozen)": (["3", "3 dozen", "3 dozens"], ["36", "3 eggs"]),
    "7 (5-pound bags)": (["7", "7 bags"], ["5", "7 boxes", "35 pounds"]),
    "3 (cups of flour)": (["3 cups", "3 cups of flour"], ["3 cups of sugar", "3 spoons of flour"]),
    "9 (hours)": (["9h", "9 h", "9 hours a day", "9 hours per week"], ["9m", "9 days"]),
    "9 (m/s)": ([r"9\frac{m}{s}", r"9\text{ m}\cdot\text{s}^{-1}", r"9\,\frac{\text{m}}{\text{s}}"], ["9 m", "9 m/h"]),
    "8 (o'clock)": (["8", "8:00", "8 o'clock"], ["8:30", "20", "9 o'clock"]),
    "5th": (["5", "5th", r"5^{\text{th}}"], ["6th", "15"]),
    "5 (left over)": (["5", "5 (left over)", "5 left over"], ["4", "5 apples and 1"]),
    "4 (and 2 left)": (["4"], ["2", "4 (and 3 left)", "6"]),
    "5 (times)": (["5", "5 times"], ["4 times"]),
    "7 (quarters)": (["7", "7 quarters"], ["7 dimes", "7/4"]),
    "12 (years)": (["12-year-old", "12 years of age"], ["12 months"]),
    "9 (red apples)": (["9 apples", "9 red apples", "9"], ["9 green apples", "9 red pears"]),
    "5 (pairs of shoes)": (["5", "5 pairs", "5 pairs of shoes"], ["5 shoes", "5 boxes"]),
    "3.5 (hours)": (
        ["3.5", "3.5 hours", "3.5 hr", "3.5 hrs", "3.5 h", "3 1/2 hours", r"3\frac{1}{2}\text{ hours}", "7/2", "3.50 hrs.", "3.5 hour"],
        ["3.5 minutes", "3.5 days", "210", "210 minutes", "35 hours"],
    ),
    "9 cm": (
        ["9", "9 cm", "9cm", "9 centimeters", "9 centimetres", "9 cm.", r"9\text{ cm}", r"9 \mathrm{cm}", "9 (cm)", "9 centimeter"],
        ["9 m", "9 mm", "90 mm", "9 cm^2", "9 km", "9 inches", "0.09 m", "9 square cm"],
    ),
    "15 (square feet)": (
        ["15", "15 square feet", "15 sq ft", "15 sq. ft.", "15 ft^2", r"15\text{ ft}^2", "15 feet squared", "15 ft²"],
        ["15 feet", "15 cubic feet", "15 ft^3", "15 square inches"],
    ),
    "8 (cubic inches)": (["8 in^3", r"8\text{ in}^3", "8 cubic inch", "8 in³"], ["8 inches", "8 in^2", "8 cubic feet"]),
    r"15\text{ cm}^2": (["15", "15 cm^2", "15 cm²", "15 square centimeters"], ["15 cm", "15 m^2", "15 cm^3"]),
    "3 (m)": (["3", "3 m", "3 meters", "3 metres", r"3\text{ m}"], ["3 km", "3 miles", "3 minutes", "3 mm"]),
    "60 (miles per hour)": (
        ["60", "60 mph", "60 miles per hour", "60 miles/hour", "60 miles an hour", "60 mi/h", r"60\text{ mph}", "60 miles/hr"],
        ["60 km/h", "60 kph", "60 miles", "60 feet per second", "60 miles per minute"],
    ),
    "5 m/s": (["5", "5 meters per second", r"5\text{ m/s}", "5 m/sec"], ["5 m", "5 km/h", "5 s", "5 cm/s"]),
    "60 km/h": (["60 kph", "60 kilometers per hour", r"60\ \frac{\text{km}}{\text{h}}", "60 km per hour"], ["60 km", "60 mph"]),
    "12 (dollars)": (
        ["12", "$12", r"\$12", "12 dollars", "$12.00", "12$", "12 dollars each", "$12 a day", "12 US dollars", "$12 per ticket", "12 USD", "US$12", "USD 12", r"12\$"],
        ["12 cents", "€12", "£12", "12 euros", "$1.2", "$120", "12 apples"],
    ),
    "$18.90": (["18.9", "18.90", "$18.90", "18.9 dollars", r"18.90\text{ dollars}"], ["$18.09", "1890 cents", "£18.90"]),
    "€5": (["5", "5 €", "5 euros", "5 EUR", "€5.00", "5 euro"], ["$5", "£5", "5 cents"]),
    "£5": (["5", "5 pounds", "5 GBP"], ["$5", "5 kg"]),
    "5 (pounds)": (["5 lb", "5 lbs", "5 pounds", "5 lbs.", "£5"], ["5 ounces", "5 kg", "$5"]),
    "25 (cents)": (["25", "25 cents", "25¢", "25 cent"], ["$25", "25 dollars", "0.25 euros"]),
    "50%": (
        ["50", "50%", r"50\%", "50 %", "50 percent", "50 per cent", "50 pct", "0.5", "1/2", "50 (%)", r"50\text{ percent}", "50%."],
        ["5%", "500%", "5", "50 apples", "$50", "0.05"],
    ),
    "20 (percent)": (["20", "20%", r"20\%", "20 per cent", "0.2"], ["20 dollars", "2%", "20 degrees"]),
    "90 (degrees)": (
        ["90", "90 degrees", r"90^\circ", r"90^{\circ}", "90°", r"90\text{ degrees}", "90 deg", r"90\degree", "90 degree"],
        [r"90\%", "90 radians", r"9^\circ", "90 meters"],
    ),
    "20 °C": (["20", "20 degrees Celsius", r"20^\circ\text{C}", "20°C", "20 degrees", r"20^{\circ}C"], ["20 °F", "20 degrees Fahrenheit", "20%"]),
    "4 (children)": (["4 child", "4 children", "4 kids"], ["4 adults"]),
    "6 (people)": (["6 persons", "6 people", "6 person"], ["6 dogs"]),
    "7 (boxes)": (["7 box", "7 boxes"], ["7 bags"]),
    "2 (feet)": (["2 foot", "2 ft", "2 feet tall", "2 ft."], ["2 inches", "2 yards"]),
    "12 (years old)": (["12", "12 years", "12 years old", "12 yrs"], ["12 months"]),
    "5 (liters)": (["5 L", "5 litres", "5 liter", "5 l"], ["5 ml", "5 gallons"]),
    "7 (days)": (["7", "7 days", "7 day"], ["7 weeks", "1 week"]),
    "1/2 (cup)": (["1/2", "0.5 cups", r"\frac{1}{2}", r"\frac12\text{ cup}", "1/2 cup", ".5"], ["1/2 teaspoon", "2", "1/3 cup", "2/4"]),
    "2 1/2 (hours)": (["2.5", "2 1/2", "5/2", r"2\frac12", "2 1/2 hours"], ["2 1/3 hours", "2", "1/2", "2 1/2 days"]),
    "1,200 (feet)": (["1200", "1,200 feet", r"1{,}200", "1 200 ft"], ["1.2", "1", "200", "1,20"]),
    "8 (apples); 4 (pears)": (
        ["8 apples and 4 pears", "8, 4", "8; 4", "8 apples, 4 pears", "4 pears; 8 apples", r"8\text{ apples}, 4\text{ pears}"],
        ["8", "8 pears, 4 apples", "12", "8; 5", "8 4"],
    ),
    "8; 4": (["8, 4", "8 and 4", "4; 8"], ["8", "84", "8:4"]),
    "2 hours 30 minutes": (["2 hours and 30 minutes", "2 hr 30 min", "2 hours, 30 minutes"], ["2 hours", "2 hours 3 minutes", "2:30 pm"]),
    r"6\pi\text{ cm}": ([r"6\pi", r"6\pi cm", r"6 \pi\text{ centimeters}", r"6\pi\,\mathrm{cm}"], [r"6\pi\text{ m}", r"6\pi\text{ cm}^2", "6"]),
    r"2\sqrt{3}": ([r"2\sqrt{3}\text{ cm}", r"\sqrt{12}", r"2\sqrt 3 \text{ units}"], [r"2\sqrt{3} t", r"3\sqrt{2}", r"2\sqrt{3}+1"]),
    r"5\sqrt{2}\text{ m}": ([r"5\sqrt2", r"5\sqrt{2}\text{ meters}"], [r"5\sqrt{2}\text{ km}", r"5\sqrt{2}\text{ s}"]),
    "yes": (["Yes", "yes", "YES", r"\text{Yes}", "**yes**"], ["no", "1"]),
    "no": (["No"], ["on", "yes", "n"]),
    # words with full stops
    "Mrs. Hilt": (["Mrs. Hilt", "Mrs Hilt", "mrs. hilt", r"\text{Mrs. Hilt}"], ["Mr. Hilt", "Mrs", "Hilt", "Mrs. Hill"]),
    "U.S.": (["U.S.", "US", "U.S"], ["U.K.", "SU"]),
    "Dr. Smith": (["Dr. Smith", "Dr Smith"], ["Dr.", "Smith"]),
    "St. Louis": (["St. Louis", "St Louis"], ["Louis", "St"]),
    "J. K. Rowling": (["J. K. Rowling", "J.K. Rowling"], ["Rowling", "J", "K. J. Rowling"]),
    "Red Team": (["red team", "Red Team"], ["Team", "Red", "blue team"]),
    # times of day
    "12:30": (["12:30", "12:30 p.m.", "12 : 30", r"12{:}30", r"\text{12:30}"], ["2:5", "12.5", "12:03", "1:30", "12/30", "2/5", "0.4", "12"]),
    "3:30 p.m.": (["3:30", "3:30 pm", "3:30 PM", "3:30 P.M.", "03:30 p.m.", "15:30", r"3{:}30\text{ p.m.}"], ["3:30 a.m.", "3.5", "7/2", "3:03 pm", "15.5"]),
    "12:30 (P.M.)": (["12:30", "12:30 pm"], ["12:30 am", "2:5", "0:30"]),
    "3 p.m.": (["3 pm", "3:00 p.m.", "3", "3:00", "3 o'clock", "15:00"], ["3 a.m.", "3:30 pm", "3 apples"]),
    "9:05": (["09:05", "9:05 am"], ["9:5", "9:50", "9.05"]),
    # ratios
    "1:2": (["1:2", "1 : 2", "1 to 2", r"1\colon 2", "1/2", r"\frac{1}{2}", r"1\!:\!2"], ["2:4", "2:1", "1:3", "12", "0.5", "1:2:1", "1"]),
    "2:5": (["2:5"], ["12:30", "4:10", "5:2", "2.5", "25"]),
    "1:2:3": (["1:2:3", "1 : 2 : 3"], ["1:2", "1/6", "1:3:2", "2:4:6"]),
    # bare points, and other things that math-verify reads in part
    "1/3": (["1./3", "1/3", "1./3.", r"\frac{1.}{3}", r"\frac13", "0.333333", "1/3."], ["1./7", "1/7", "0.333", "1", "3", "1./30"]),
    "1./7": (["1/7", "1./7"], ["1./3", "1", "1/3"]),
    "3./4": (["3/4", "0.75", "3./4", ".75"], ["3./5", "3", "3/5", "4./3"]),
    "1.e-3": (["0.001", "1e-3", r"1\times 10^{-3}", "1.0e-3"], ["1.e-4", "1", "0.0001", "1e3"]),
    "2.x": (["2x", "2.x", "2 x", "x*2"], ["2.y", "2", "2y", "3.x"]),
    r"2.\sqrt{3}": ([r"2\sqrt{3}"], ["2", r"2.\sqrt{5}"]),
    r"10^{100}": ([r"10^{100}", "1e100", r"1 \times 10^{100}", "10^100"], ["10", "100", r"10^{10}", "1e10", "1"]),
    "3+2t": (["2t+3", "3 + 2t", "3+t+t"], ["3+2d", "3+2", "5t", "3+2h"]),
    "x+5m": (["5m+x"], ["x+5s", "x+5"]),
    "f'(x)": (["f'(x)"], ["f(x)", "f''(x)"]),
    r"\sqrt{2}": (
        [r"\sqrt{2}", r"\sqrt2", r"\frac{2}{\sqrt{2}}", "1.414214", "1.41421356"],
        ["1.41421", "1.414", "1.414213", r"\sqrt{3}", "2", r"\sqrt{2} @ 3", r"\sqrt{2} ? 5", r"\sqrt{2} & 3", r"\sqrt{2} \approx 7"]
        + [r"\sqrt{2}\text{ wrong}", r"\sqrt{2} or 5", r"\sqrt{2})", r"\sqrt{2}+", r"(\sqrt{2}", r"\sqrt{2}}", "1 2"],
    ),
    r"0.\overline{3}": (["1/3", "0.333333", r"0.\overline{3}", r"\frac{1}{3}"], ["0", "0.3", "3", r"0.\overline{4}"]),
    r"\log_2 3": ([r"\frac{\ln 3}{\ln 2}", "1.584963"], [r"\log_3 2", r"\log_2 5", "1.58"]),
    r"\approx 8.24 \text{ mph}": (["8.24", r"\approx8.24\text{ mph}", "8.24 mph"], ["8.2", "8.24 km/h"]),
    "12x": (["12x", "12 x", "x*12"], ["1 2x", "2x", "12", "12.x.3"]),
    "x^2+1=0": (["x^2+1=0", "x^2=-1", "1+x^2=0"], ["x^2+4=0", "x=1", "y^2+1=0"]),
    "y=2x+1": (["y=2x+1", "y = 1+2x", "2x+1"], ["y=2x-1", "y=2x"]),
    # one tolerance, however the reference is written
    r"\frac{1}{3}": (["0.333333", "0.3333333", "0.33333333333333333"], ["0.333", "0.33333", "0.333334", "0.3333330", "0.3"]),
    "0.333333": (["1/3", r"\frac{1}{3}", "0.3333333"], ["0.333", "0.33333", "0.333334", "1/4"]),
    "0.3333333333333333": (["1/3", "0.333333"], ["0.333", "0.33333"]),
    "0.333": (["0.333", ".333", "0.3330"], ["1/3", "0.333333", "0.33"]),
    "3": (["3", "3.0", "3.000000", "+3"], ["3.0000001", "2.9999999", "3.1", "6/2", r"\sqrt{9}"]),
    "3.000000": (["3", "3.0"], ["3.0000001", "2.9999999"]),
    "3.0000001": (["3.0000001"], ["3", "3.0", "3.000000"]),
    "6/2": (["3", "6/2"], ["3.0000001", "2"]),
    r"\pi": ([r"\pi", "π", "3.141593", "3.14159265", r"\frac{2\pi}{2}"], ["3.14", "3.14159", "3.141592", "22/7", "3"]),
    "3.141593": ([r"\pi", "3.141593", "3.14159265"], ["3.14159", "22/7", "3.1416"]),
    "3.14": (["3.14", "3.140"], [r"\pi", "3.14159", "3.1"]),
    "1/2": (["0.5", ".50", r"\frac12"], ["0.500001", "0.4999999", "2/4", "5"]),
    r"2^{-3}": (["0.125", "1/8", r"\frac18"], ["0.1250001", "-8", "0.12"]),
    "0.000001": (["0.000001", "1e-6"], ["0.0000014", "0", "0.00001"]),
    # words and products of letters
    "ab": (["ab", "AB", r"\text{ab}"], ["ba", "a", "abc"]),
    "east": (["East", r"\text{east}"], ["seat", "eats", "west"]),
    "listen": (["Listen"], ["silent", "enlist"]),
    "2ab": (["2ba", "2ab", "ab*2"], ["ab", "2a"]),
    "A": (["A", "(A)", r"\text{A}", "a", "A."], ["B", "AB", "A or B"]),
    r"\begin{pmatrix} 1 \\ 1/3 \end{pmatrix}": (
        [r"\begin{pmatrix} 1 \\ \frac13 \end{pmatrix}", r"\begin{bmatrix}1\\0.333333\end{bmatrix}"],
        [r"\begin{pmatrix} 1 & 1/3 \end{pmatrix}", r"\begin{pmatrix} 1/3 \\ 1 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 0.333 \end{pmatrix}"],
    ),
}  # fmt: skip
ROWS = [
    (wanted, given, right)
    for wanted, both in SAME_OR_NOT.items()
    for answers, right in zip(both, (True, False), strict=True)
    for given in answers
]


def test_the_table_is_large_enough():
    assert len(ROWS) > 500 and sum(right for *_, right in ROWS) > 200


@pytest.mark.parametrize("wanted", SAME_OR_NOT)
def test_boxed(wanted):
    right, wrong = SAME_OR_NOT[wanted]
    assert [given for given in right if judge({"answer": wanted}, rf"So it is $\boxed{{{given}}}$.").score != 1] == []
    balanced = [given for given in wrong if given.count("{") == given.count("}")]
    assert [given for given in balanced if judge({"answer": wanted}, rf"So it is $\boxed{{{given}}}$.").score] == []


@pytest.mark.parametrize("wanted", SAME_OR_NOT)
def test_tagged_and_stated(wanted):
    right, wrong = SAME_OR_NOT[wanted]
    for form in (
        "<answer>{}</answer>",
        "We add.\n\nThe answer is {}.",
        "The answer is {}. Then he sleeps.",
        "Answer: {}",
    ):
        said = [given for given in right if judge({"answer": wanted}, form.format(given)).score != 1]
        assert said == [], form
        assert [given for given in wrong if judge({"answer": wanted}, form.format(given)).score] == [], form


# Replies as models write them: reference, prompt, right ones, wrong ones.
REPLIES = [
    (
        "42",
        "How many apples are there?",
        [
            "The answer is **42** because 6*7=42.",
            "The answer is 42, since 6 x 7 is.",
            "The answer should be 42.",
            "The answer is therefore 42.",
        ]
        + [
            "Thus, the final answer is:\n\n42\n\nDone.",
            "### Final Answer\n\n**42**",
            "**Answer**\n\n42",
            "So the answer is\n$$\n42\n$$",
        ]
        + [
            'The answer is "42".',
            "The answer is 42;",
            r"\boxed{\bf 42}",
            r"\boxed{\color{red}{42}}",
            r"\boxed{\texttt{42}}",
        ]
        + [
            "The answer is $42$, as desired.",
            "The answer is $42$ and we are done.",
            "The answer is 42. I put it in \\boxed{}.",
        ],
        [
            "The answer is $42$ or $41$.",
            "The answer is $42$ and $41$.",
            "The answer is $42$, $41$ or $40$.",
            "The answer is $42$/$41$.",
        ]
        + [
            "The answer is $42$ plus 3.",
            "The answer is $42$ + $1$.",
            "The answer is $42$ thousand.",
            r"The answer is $42$ \(41\)",
        ]
        + [r"\boxed{41=42}", "The answer is 41 because 42 is wrong.", "The answer is \\boxed{}", "It is 42. \\boxed{}"],
    ),
    (
        "B",
        "Which one? (A) 1/2 (B) 2/3 (C) red and blue",
        [
            "B) 2/3",
            "(B) 2/3",
            "B. 2/3",
            "B: 2/3",
            "option B",
            "Option (B)",
            r"\boxed{\textbf{(B)}\ 2/3}",
            r"\boxed{\text{(B) } 2/3}",
        ]
        + ["The answer is **(B) 2/3**.", "The correct answer is **B**: it is so.", "The answer is B because A is not."],
        ["A) 1/2", "(B) or (A)", "B) or A)", "A: B", "B. A. C.", "(B) + 1", "options B and A", "AB) 1", "(C) B"],
    ),
    ("C", "Which one?", ["(C) red and blue", "The answer is C. red, blue"], ["(A) red and blue"]),
    ("b", "Solve $a + b = 0$ for $b$.", ["b"], ["(b) - 1", "(b) a"]),
    (
        "(2,-1)",
        "Solve.",
        ["x=2, y=-1", "x = 2 and y = -1", "(x, y) = (2, -1)"],
        ["x=-1, y=2", "x=2, x=-1", "x=2, y=-1, z=0"],
    ),
    ("x = 2, y = -1", "Solve.", ["(2,-1)"], ["(-1,2)", "(2,1)"]),
    ("1, 2, 3", "Find all.", ["The answer is $1$, $2$ and $3$."], ["The answer is $1$, $2$ and $4$."]),
    ("2516_8", "What is it in base 8?", ["2516"], ["2517", "2516_9", r"2516_{10}"]),
    ("10^{12}", "?", [r"1{,}000{,}000{,}000{,}000"], [r"1{,}000{,}000{,}000"]),
    ("70000", "?", [r"70{\,}000"], [r"7{\,}000"]),
    ("3 1/2", "?", ["3\u00bd"], ["3\u00bc"]),
    ("1:2", "?", ["1\u22362"], ["2\u22361"]),
    (r"16\pi", "?", ["16 pi", r"\boxed{16pi}"], ["16 pie"]),
    (r"\frac34", "?", [r"\cfrac{3}{4}"], [r"\cfrac{4}{3}"]),
    (
        "Monday",
        "Which day?",
        ["The answer is Monday, since 8 mod 7 is 1.", "*Monday*", "\u201cMonday\u201d"],
        ["Monday*"],
    ),
]


@pytest.mark.parametrize(
    ("reference", "prompt", "reply", "expected"),
    [(a, p, reply, True) for a, p, right, _ in REPLIES for reply in right]
    + [(a, p, reply, False) for a, p, _, wrong in REPLIES for reply in wrong],
)
def test_replies_as_models_write_them(reference, prompt, reply, expected):
    assert (judge({"prompt": prompt, "answer": reference}, reply).score == 1.0) is expected
