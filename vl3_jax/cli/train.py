"""`vl3 train`: one command for every stage; the same command resumes an interrupted run."""

import argparse
import os

from vl3_jax.cli import process_flags, settings_flags

EPILOG = """examples:
  vl3 train --config stage1:2b,mock --workdir /tmp/stage1
  vl3 train --config stage4:2b --workdir gs://bucket/stage4 --config.init_from=gs://bucket/stage3 \\
      --config.data.root=/data --config.mesh.fsdp=16 --config.mesh.data=-1
  vl3 ask --model WORKDIR --image photo.jpg "What is this?"

Every setting of the configuration can be changed: --config.a.b=VALUE. Configurations are stage1 to stage4 (variants 2b,
7b), finetune (video, image, lora) and nano (0 to 4), or a Python file of your own, which is run like any program; the
variant `mock` shrinks a run to a tiny model on synthetic data, for any machine.
exit codes: 0 done, or stopped by SIGTERM, SIGHUP or Ctrl-C after a checkpoint; 1 a failure of ours, a process of the
job or a data worker that died, or a loss that is not finite; 2 bad input, a full disk, or another job writes the
workdir; 130 stopped at once by Ctrl-C"""
CONFIG = "NAME[:VARIANT,...]"
CONFIG_HELP = (
    "a configuration of this package (stage4:7b, finetune:lora), or a Python file of your own, which is run as any "
    "program: give only files that you trust"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--config", required=True, metavar=CONFIG, help=CONFIG_HELP)
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="new, or that of the run to resume; may be gs://"
    )
    settings_flags.add_changes(parser)
    process_flags.add(parser)


def run(arguments: argparse.Namespace) -> None:
    import jax

    from vl3_jax import compilation_cache
    from vl3_jax.training import run_config

    config = run_config.load(arguments.config, arguments.set)
    if config.cpu_devices and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    process_flags.connect(arguments)
    compilation_cache.enable()

    from vl3_jax.training.loop import train

    ask = None
    if config.eval.tasks:
        from vl3_jax.evaluation.in_training import TrainingBenchmarks

        ask = TrainingBenchmarks(config.eval).measure
    train(config, arguments.workdir, ask)
