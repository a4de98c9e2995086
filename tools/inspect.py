"""Show a sample's whole life as text: prompt, answer, scores, zone, the teacher's choices at each token, training rows.

``python tools/inspect.py RUN --sample ID``
"""

from __future__ import annotations

if __name__ == "inspect":
    from _standard_library import stand_back

    stand_back(__name__)
else:
    import argparse
    import json
    from collections.abc import Sequence
    from pathlib import Path

    from megatron_npd.log import get_logger, run_main
    from megatron_npd.platform import get_platform

    def main(argv: Sequence[str] | None = None) -> None:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("run", help="directory of a run")
        parser.add_argument("--sample", required=True, help="id of a sample, as in rollouts.parquet")
        parser.add_argument("--tokenizer", default="", help="Hugging Face directory; default: the run's student")
        parser.add_argument(
            "--platform", default="auto", choices=("auto", "cpu", "cuda", "npu"), help="device platform"
        )
        arguments = parser.parse_args(argv)
        get_logger().setLevel("WARNING")
        get_platform(arguments.platform)
        from megatron_npd.loop.sample import describe_sample  # after the platform is chosen

        decode = None
        if directory := arguments.tokenizer or _student(Path(arguments.run)):
            from megatron_npd.data.tokenizer import load_tokenizer

            tokenizer = load_tokenizer(directory)
            decode = lambda ids: str(tokenizer.decode(ids))  # noqa: E731
        print(describe_sample(arguments.run, arguments.sample, decode), end="")

    def _student(run: Path) -> str:
        """The student that the run began with, where it is still there; its tokenizer is every policy's."""
        config = run / "config.json"
        student = json.loads(config.read_text()).get("student", "") if config.is_file() else ""
        return student if student and Path(student).is_dir() else ""

    if __name__ == "__main__":
        run_main(main)
