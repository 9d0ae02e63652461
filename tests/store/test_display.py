"""Progress where there is no terminal."""

from steerable.store import display


def test_without_a_terminal_a_line_a_minute(monkeypatch, capsys):
    now = iter([0.0, 30.0, 70.0, 100.0, 140.0])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(now))
    shown = display.Display()
    shown.part = "stage 2 of 9"
    shown.start("generating", 300)
    for finished in (10, 60, 20, 210):
        shown.advance(finished, 100 * finished)
    said = capsys.readouterr()
    assert said.out == "" and said.err.splitlines() == [
        "stage 2 of 9, generating: 70 of 300, 100 tokens/s, 4 min left",
        "stage 2 of 9, generating: 300 of 300, 214 tokens/s",
    ]
