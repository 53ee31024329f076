.PHONY: install test test-slow quality style

CODE = src tests examples

install:
	pip install -c constraints.txt -e ".[test]"

test:
	HF_HUB_OFFLINE=1 pytest

test-slow:
	HF_HUB_OFFLINE=1 pytest -m slow

quality:
	ruff check $(CODE)
	ruff format --check $(CODE)

style:
	ruff check --fix $(CODE)
	ruff format $(CODE)
