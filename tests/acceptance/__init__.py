"""The whole service, from the outside, through its public doors only."""
