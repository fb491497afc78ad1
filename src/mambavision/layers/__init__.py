"""The parts of the network: parameters and a readable forward each; arithmetic with several backends is in ops."""
