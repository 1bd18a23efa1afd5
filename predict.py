"""What a network sees in images: python predict.py FILE IMAGE..."""

from biper.commands.predict import main

if __name__ == "__main__":
    main()
