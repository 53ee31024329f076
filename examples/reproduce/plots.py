"""What the scripts beside this file draw with."""


def pyplot():
    """matplotlib's `pyplot`, which needs no display."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit('The pictures need matplotlib: pip install "hf-weightgen[plots]"') from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt
