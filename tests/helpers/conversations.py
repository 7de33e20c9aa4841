"""What a model answers, computed without a cache."""


def answers(generator, *messages, system="", tokens=20):
    """Return the answers as they are without a cache, each to the whole text before it."""
    text, found = f"System: {system}\n" if system else "", []
    for number, message in enumerate(messages):
        text += f"User: {message}\nAssistant: "
        done = generator.complete(text, tokens, seed=3 + number, stop=["\nUser:"])
        found.append(done.text)
        text += f"{done.text.strip()}\n"
    return found
