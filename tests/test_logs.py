"""Log lines of the library: shown by the command, in the hands of a program that imports it."""

import io
import logging

from tqdm import tqdm

from vl3_jax import logs


def test_lines_are_plain_and_shown_for_as_long_as_asked(capsys):
    library, elsewhere = logging.getLogger("vl3_jax.checkpoint.some"), logging.getLogger("some.other")
    with logs.on_terminal():
        library.info("%s is complete already", "DIR")
        library.debug("not shown")
        elsewhere.info("not ours")
        logging.getLogger("data_pipelines.some").warning("one line")
    library.info("not any more")
    assert capsys.readouterr().err == "DIR is complete already\none line\n"


def test_a_line_stands_above_the_bar(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    with logs.on_terminal(), tqdm(total=2, file=screen, bar_format="BAR", mininterval=0) as bar:
        bar.update(1)
        logging.getLogger("vl3_jax").info("a line")
    before, line, after = screen.getvalue().partition("a line\n")
    assert line
    assert before.endswith("\r")  # the bar was cleared
    assert "BAR" in before
    assert "BAR" in after  # and shown again


def test_a_handler_of_the_root_does_not_show_lines_twice(capsys, monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [*root.handlers, logging.StreamHandler()])
    with logs.on_terminal():
        logging.getLogger("vl3_jax").info("once")
    assert capsys.readouterr().err == "once\n"


def test_the_library_leaves_handlers_to_the_program():
    for name in logs.PACKAGES:
        logger = logging.getLogger(name)
        assert not logger.handlers
        assert logger.level == logging.NOTSET
        assert logger.propagate
