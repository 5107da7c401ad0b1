"""Reports for users: HTML pages with their figures, and the summary of a router.

Start with evaluation_page.py; label_page.py and log_page.py reuse its templates and number formats.
"""
