"""Pack a binary network: python export.py CHECKPOINT -o FILE [--onnx FILE.onnx]."""

from biper.commands.cli import export_main

if __name__ == "__main__":
    export_main()
