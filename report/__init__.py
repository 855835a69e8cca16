"""What people look at: report.html, its pictures, and the model card."""
