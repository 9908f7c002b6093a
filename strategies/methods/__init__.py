"""Aggregation methods: each file has the strategy of one paper."""
