"""Show a sample's whole life as text: prompt, answer, scores, zone, the teacher's choices at each token, training rows.

``python tools/inspect.py RUN --sample ID``. ``--export FILE.parquet`` writes a round's annotations instead, tokens and
the teacher's records as plain numbers, which any tool reads and ``tools/preprocess_data.py`` takes back.
"""

from __future__ import annotations

if __name__ == "inspect":
    from _standard_library import stand_back

    stand_back(__name__)
else:
    import json
    from collections.abc import Sequence
    from pathlib import Path

    from megatron_npd.config.command_line import CommandParser
    from megatron_npd.errors import UserError
    from megatron_npd.log import run_main, wrote
    from megatron_npd.manifest import read_manifest
    from megatron_npd.platform import get_platform

    def main(argv: Sequence[str] | None = None) -> None:
        parser = CommandParser(description=__doc__)
        parser.add_argument("run", help="directory of a run; to export, an annotations directory will do")
        parser.add_argument("--sample", help="id of a sample, as in rollouts.parquet")
        parser.add_argument("--export", metavar="FILE", help="Parquet file to write a round's annotations to")
        parser.add_argument("--round", type=int, help="round to export; default: the last that is annotated")
        parser.add_argument("--tokenizer", default="", help="Hugging Face directory; default: the run's student")
        parser.add_argument(
            "--platform", default="auto", choices=("auto", "cpu", "cuda", "npu"), help="device platform"
        )
        arguments = parser.parse_args(argv)
        if (arguments.sample is None) == (arguments.export is None):
            parser.error("one of --sample and --export must be given")
        get_platform(arguments.platform)
        if arguments.export:
            from megatron_npd.store.export import export_store, find_annotations

            annotations = find_annotations(arguments.run, arguments.round)
            Path(arguments.export).parent.mkdir(parents=True, exist_ok=True)
            number = export_store(annotations, arguments.export)
            which = read_manifest(annotations, verify=False).provenance["round"]
            print(f"{number} samples of round {which} ({annotations}) in {arguments.export}")
            wrote(arguments.export, f"tools/preprocess_data.py --input {arguments.export} --hf-model STUDENT --out DIR")
            return
        from megatron_npd.audit.sample import describe_sample  # after the platform is chosen

        decode = None
        if directory := arguments.tokenizer or _student(Path(arguments.run)):
            from megatron_npd.data.tokenizer import load_tokenizer

            tokenizer = load_tokenizer(directory)
            decode = lambda ids: str(tokenizer.decode(ids))  # noqa: E731
        print(describe_sample(arguments.run, arguments.sample, decode), end="")

    def _student(run: Path) -> str:
        """The student that the run began with, where it is still there; its tokenizer is every policy's."""
        config = run / "config.json"
        try:
            student = json.loads(config.read_text())["student"] if config.is_file() else ""
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{config} must name the run's student, got {error!r}; give --tokenizer") from error
        return student if student and Path(student).is_dir() else ""

    if __name__ == "__main__":
        run_main(main)
