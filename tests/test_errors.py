"""What errors are made of."""

from pathlib import Path

from mcp_lora.errors import advice, one_line


def test_the_message_of_another_package_is_one_line_and_short() -> None:
    assert one_line(ValueError("two\n  lines\tand a tab")) == "two lines and a tab"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("long " * 1000))) == 300


def test_a_command_can_be_pasted() -> None:
    assert advice("export", Path("my run"), "--output", "OTHER") == "mcp-lora export 'my run' --output OTHER"
