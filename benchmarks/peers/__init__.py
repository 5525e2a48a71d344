"""Peers that `bench_peers.py` compares Surefoot with. Each runs in a process of its own and answers three questions:
seconds of a decode step at a batch size, seconds of a prefill, seconds from start to the first token."""
