"""The command `avfast flow`, see avfast.opticalflow.extraction."""

from avfast.opticalflow.extraction import FlowConfig, extract_flow, main

__all__ = ["FlowConfig", "extract_flow", "main"]

if __name__ == "__main__":
    from avfast.cli.command import run_command

    run_command(main)
