"""`vl3 train`: one command for every stage; the same command goes on after an interruption."""

import argparse
import os

EPILOG = """examples:
  vl3 train --config configs/stage1_2b.py:mock --workdir /tmp/stage1
  vl3 train --config configs/stage4_2b.py --workdir gs://bucket/stage4 --config.init_from=gs://bucket/stage3 \\
      --config.data.root=/data --config.mesh.fsdp=16 --config.mesh.data=-1
  vl3 ask --model WORKDIR --image photo.jpg "What is this?"

Every setting of the configuration can be changed: --config.a.b=VALUE. Configurations are the files of configs/; the
variant `:mock` shrinks a run to a tiny model on drawn data, for any machine.
exit codes: 0 done, or stopped by SIGTERM after a checkpoint; 1 a failure of ours; 2 bad input"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.epilog = EPILOG
    parser.add_argument("--config", required=True, metavar="FILE[:mock]", help="a file of configs/, or your own")
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="new, or of the run to go on with; may be gs://"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="the same as --config.KEY=VALUE"
    )
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of several processes; TPU pods and clusters need none"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="with --coordinator")
    parser.add_argument("--process-id", type=int, metavar="I", help="with --coordinator")


def run(arguments: argparse.Namespace) -> None:
    """Trains."""
    import jax

    from vl3_jax import compilation_cache, config_file
    from vl3_jax.parallel import processes

    config = config_file.load(arguments.config, arguments.set)
    if config.cpu_devices and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    processes.start(arguments.coordinator, arguments.processes, arguments.process_id)
    compilation_cache.enable()

    from vl3_jax.training.loop import train

    train(config, arguments.workdir)
