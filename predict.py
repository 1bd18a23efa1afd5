"""What a network sees in images: python predict.py FILE IMAGE..."""

from biper.commands.cli import predict_main

if __name__ == "__main__":
    predict_main()
