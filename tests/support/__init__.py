"""What several test modules share: networks, data, runs, servers, attacks and oracles. It contains no tests."""
