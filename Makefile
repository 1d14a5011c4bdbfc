# SPDX-License-Identifier: Apache-2.0
.DEFAULT_GOAL := help
.PHONY: help install style quality types floors test docs bench paper

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST)

install:  ## install the package in place, with everything a developer needs
	python -m pip install -e ".[dev]"

style:  ## format the code and mend what the linter can mend
	ruff format
	ruff check --fix

quality:  ## check format and lint
	ruff format --check
	ruff check

types:  ## check the types
	pyright --threads 2

floors:  ## check that every room of the package imports only from the floors below it
	lint-imports --no-cache --no-logo

test:  ## run the tests
	python -m pytest

docs:  ## build the documentation; any warning is an error
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

MODEL ?= runs/unet-digits
UPSCALER ?= runs/upscale-digits
bench:  ## measure speed, solvers and likelihoods, judge trained digits pipelines, MODEL=folder UPSCALER=folder
	python tests/benchmarks/bench_step.py
	OMP_NUM_THREADS=1 python tests/benchmarks/bench_training.py --use_cpu
	python tests/benchmarks/bench_data.py
	python tests/benchmarks/bench_throughput.py --tiny --num_steps 3 --compile off
	python tests/benchmarks/bench_likelihood.py
	python tests/benchmarks/bench_marginals.py
	python tests/benchmarks/bench_solvers.py
	python tests/benchmarks/bench_solvers.py --pipeline $(MODEL)
	python tests/benchmarks/default_sampling.py $(MODEL)
	python tests/benchmarks/digits_quality.py $(MODEL)
	python tests/benchmarks/anomalies.py $(MODEL)
	python tests/benchmarks/digits_edit.py $(MODEL)
	python tests/benchmarks/digits_inverse.py $(MODEL)
	python tests/benchmarks/digits_upscale.py $(UPSCALER)

paper:  ## reproduce the founding paper in small and write its page: under an hour on two cores, resumable
	python paper/in_small.py --output_dir runs/paper --page docs/paper_in_small.md
