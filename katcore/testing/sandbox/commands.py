"""Commands: exit codes, exact bytes, arguments, folders, variables, input and output."""

import os

import pytest

from katcore.protocols import Sandbox
from katcore.testing.sandbox.base import Declared, output, sh


class Commands(Declared):
    """What becomes of one command."""

    @pytest.mark.parametrize("code", [0, 1, 3, 126, 127, 255])
    async def test_the_exit_code_is_the_command_s(self, sandbox: Sandbox, code: int) -> None:
        assert (await sh(sandbox, f"exit {code}")).exit_code == code

    async def test_death_by_a_signal_is_128_and_its_number(self, sandbox: Sandbox) -> None:
        assert (await sh(sandbox, "kill -TERM $$")).exit_code == 128 + 15

    async def test_a_program_that_is_not_there_is_127_and_named(self, sandbox: Sandbox) -> None:
        result = await sandbox.exec(["no-such-program"])
        assert result.exit_code == 127
        assert b"no-such-program" in result.stderr

    async def test_a_file_that_is_no_program_is_126_and_named(self, sandbox: Sandbox) -> None:
        await sandbox.write(f"{self.workdir}/plain", b"text")
        result = await sandbox.exec([f"{self.workdir}/plain"])
        assert result.exit_code == 126
        assert b"plain" in result.stderr

    async def test_output_is_exact_bytes_of_each_stream(self, sandbox: Sandbox) -> None:
        result = await sh(sandbox, r"printf '\000\377\r\n\n'; printf 'no line end' >&2")
        assert result.stdout == b"\0\xff\r\n\n"
        assert result.stderr == b"no line end"
        assert not result.truncated

    async def test_all_bytes_come_through(self, sandbox: Sandbox) -> None:
        data = bytes(range(256)) * 500
        await sandbox.write(f"{self.workdir}/all", data)
        assert (await sandbox.exec(["cat", "all"])).stdout == data

    async def test_arguments_reach_the_program_as_they_are(self, sandbox: Sandbox) -> None:
        words = ["", "a b", "$HOME", "'\"", "\n", "日本", "*", "-n", "`id`", "\\"]
        result = await sandbox.exec(["printf", r"%s\001", *words])
        assert result.stdout.split(b"\1")[:-1] == [word.encode() for word in words]

    async def test_a_null_byte_is_refused_and_harms_nothing(self, sandbox: Sandbox) -> None:
        with pytest.raises(ValueError, match="null"):
            await sh(sandbox, "echo a\0b")
        assert await output(sandbox, "echo on") == "on"

    async def test_the_working_folder_is_workdir(self, sandbox: Sandbox) -> None:
        assert await output(sandbox, "pwd") == self.workdir

    async def test_another_working_folder_holds_for_one_command(self, sandbox: Sandbox) -> None:
        assert (await sandbox.exec(["pwd"], cwd="/etc")).stdout == b"/etc\n"
        assert await output(sandbox, "pwd") == self.workdir

    async def test_a_working_folder_that_is_not_there_is_a_result(self, sandbox: Sandbox) -> None:
        result = await sandbox.exec(["pwd"], cwd="/no/such/folder")
        assert result.exit_code != 0
        assert b"/no/such/folder" in result.stderr
        assert result.stdout == b""

    async def test_a_variable_holds_for_one_command(self, sandbox: Sandbox) -> None:
        command = ["sh", "-c", 'printf %s "$WORD"']
        assert (await sandbox.exec(command, env={"WORD": "a=b c\n"})).stdout == b"a=b c\n"
        assert (await sandbox.exec(command)).stdout == b""

    async def test_a_variable_adds_to_the_sandbox_s_own(self, sandbox: Sandbox) -> None:
        result = await sandbox.exec(["sh", "-c", "command -v ls"], env={"WORD": "x"})
        assert result.exit_code == 0, "PATH is still there"

    async def test_variables_of_the_machine_do_not_get_in(self, sandbox: Sandbox) -> None:
        found = (await sandbox.exec(["env"])).stdout.decode(errors="replace")
        names = {line.partition("=")[0] for line in found.splitlines()}
        assert "PYTEST_CURRENT_TEST" in os.environ
        assert not {name for name in names if name.startswith(("PYTEST", "KATCORE", "VIRTUAL_ENV"))}

    async def test_standard_input_is_empty(self, sandbox: Sandbox) -> None:
        assert await output(sandbox, "cat; echo end") == "end"

    async def test_input_within_a_command_arrives(self, sandbox: Sandbox) -> None:
        result = await sh(sandbox, "printf 'a\\nb' | cat; cat <<'E'\n$HOME\nE\n")
        assert result.stdout == b"a\nb$HOME\n"

    @pytest.mark.parametrize("stream", ["stdout", "stderr"])
    async def test_output_beyond_the_limit_is_dropped_and_said(
        self, sandbox: Sandbox, stream: str
    ) -> None:
        to = "" if stream == "stdout" else " >&2"
        result = await sh(sandbox, f"head -c {3 * self.output_limit} /dev/zero{to}; exit 4")
        assert len(getattr(result, stream)) == self.output_limit
        assert result.truncated
        assert result.exit_code == 4, "who writes more is not stopped"

    async def test_output_up_to_the_limit_is_whole(self, sandbox: Sandbox) -> None:
        result = await sh(sandbox, f"head -c {self.output_limit} /dev/zero; echo err >&2")
        assert len(result.stdout) == self.output_limit
        assert result.stderr == b"err\n"
        assert not result.truncated

    async def test_a_background_process_lives_on(self, sandbox: Sandbox) -> None:
        await output(sandbox, "(while [ ! -e stop ]; do sleep 0.05; done; echo x > stopped) &")
        await output(sandbox, "touch stop")
        await output(
            sandbox, "for i in $(seq 100); do [ -e stopped ] && exit; sleep 0.1; done; exit 1"
        )

    async def test_it_is_one_user_who_owns_what_is_written(self, sandbox: Sandbox) -> None:
        await sandbox.write(f"{self.workdir}/by-write", b"")
        await output(sandbox, "touch by-exec")
        user, *owners = (await output(sandbox, "id -u; stat -c %u by-write by-exec")).split()
        assert owners == [user, user]

    async def test_the_user_has_a_home_and_tmp_to_write_to(self, sandbox: Sandbox) -> None:
        await output(sandbox, 'cd && echo x > in-home && rm in-home; echo x > "/tmp/in-tmp"')
