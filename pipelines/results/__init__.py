"""What graded rows say: statistics, tables, figures and MLflow runs."""
