"""What every job needs: options, output folders, progress, tracking. It knows no stage."""
