"""How every command refuses a user's mistake."""


def refusal(main, words, capfd):
    """The one line on stderr by which a command refuses, with exit code 2 and nothing on stdout."""
    capfd.readouterr()
    code = main([*map(str, words)])
    captured = capfd.readouterr()
    assert code == 2, captured
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line
