"""The weather, by a program that asks for the weather and for nothing else."""

import urllib.request


def forecast(city):
    request = urllib.request.Request("http://www.test/", headers={"X-City": city})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return f"{city}: {answer.read().decode().splitlines()[0]}"


if __name__ == "__main__":
    print(forecast("london"))
