"""Reports for users: HTML pages with their figures, and the summary of a router.

Start with `evaluation_page`; `label_page` and `log_page` reuse its templates and number formats.
"""
