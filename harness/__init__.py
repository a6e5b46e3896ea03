"""What every run needs: folder, checkpoints, loops, data, processes, costs, reports, flags."""
