"""Where arrays live: `rules` is the table of logical axes -> mesh axes and memory, `mesh` the devices under names."""
