"""Protocols, oracles, baselines and reports that judge a trained model; nothing here trains."""
