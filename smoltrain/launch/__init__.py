"""Starting a run: the supervisor that starts and watches the ranks of each phase, and what one rank does first."""
