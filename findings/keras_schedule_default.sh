#!/usr/bin/env bash
# Keras 3.15.1: a default argument of a learning-rate schedule is overwritten, so that a single step of .8 compounds.
#
# `LearningRateScheduler` first calls schedule(epoch, rate of now) and falls back to schedule(epoch) on a TypeError.
# A schedule whose second parameter is a constant with a default, here 1e-3, gets the present rate in its place and decays
# every epoch. Keras 2.0.8 passed the epoch alone, and the same file trained at a constant rate from the second epoch on.
# A released training script of the 2018 iQIYI challenge holds this schedule and pins no version: its sixth epoch is at
# 8.0e-4 or at 3.3e-4. A lambda of one parameter keeps the constant.
#
# Needs Python 3.11 or later and the network. Fails if the output changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet keras==3.15.1 jax==0.10.2

cat >"$work/expected" <<'END'
schedule(epoch, base=0.001): 1.00e-03 8.00e-04 6.40e-04 5.12e-04 4.10e-04 3.28e-04
lambda epoch: schedule(epoch): 1.00e-03 8.00e-04 8.00e-04 8.00e-04 8.00e-04 8.00e-04
END

KERAS_BACKEND=jax "$work/venv/bin/python" - >"$work/seen" <<'END'
import keras
import numpy as np


def schedule(epoch, base=0.001):
    return base if epoch == 0 else base * 0.8


def rates(schedule):
    """Learning rate of each of six epochs of training."""
    net = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    net.compile("adam", "mse")
    seen = []
    note = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: seen.append(float(net.optimizer.learning_rate)))
    callbacks = [keras.callbacks.LearningRateScheduler(schedule), note]
    net.fit(np.zeros((4, 2)), np.zeros(4), epochs=6, verbose=0, callbacks=callbacks)
    return " ".join(f"{rate:.2e}" for rate in seen)


print("schedule(epoch, base=0.001):", rates(schedule))
print("lambda epoch: schedule(epoch):", rates(lambda epoch: schedule(epoch)))
END

diff "$work/expected" "$work/seen" && cat "$work/seen"
