"""What the study costs: time, memory and the share of the machine that is reached, each line in a process of its own.

python -m benchmarks [--only NAME ...] [--scale tiny|full] [--reference PATH] [--save FILE.json]
"""
