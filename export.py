"""Pack a binary network: python export.py CHECKPOINT -o FILE [--onnx FILE.onnx]."""

from biper.commands.export import main

if __name__ == "__main__":
    main()
