"""Other libraries' ways to the same networks; each module registers itself when it is imported, and none is by ours."""
